"""The documentation: its commands run; its messages, flags, links, paths and numbers are real."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megasparse import errors, kernels
from megasparse.config.fields import ALIASES, FIELDS
from megasparse.data.tokenizers.tokenizer import load_tokenizer, tokenizer_file_of
from megasparse.metrics.schema import METRICS
from tests.test_architecture import LEVELS
from tools.flag_table import BEGIN, END, with_table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page that are marked with a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


# Smaller numbers for the tutorial's commands; each must be found in it.
SMALLER = {
    "--max-bytes 6000000": "--max-bytes 300000",
    "--vocab-size 2048": "--vocab-size 400",
    "--workers 2": "--workers 1",
    "--exit-interval 100": "--exit-interval 4",
    "--train-iters 200": "--train-iters 8 --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 "
    "--num-attention-heads 4 --num-query-groups 2 --seq-length 32 --sample-tokens 2 "
    "--mask-update-interval 2",
    "--max-new-tokens 64": "--max-new-tokens 4",
    "--max-tokens 20000": "--max-tokens 200",
    "runs/tutorial": "{folder}",
}


ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}


def test_the_tutorial_runs(tmp_path, quick_python):
    import transformers

    script = "".join(blocks("tutorial.md", "sh"))
    for written, smaller in SMALLER.items():
        assert written in script, f"{written} is no longer in the tutorial"
        script = script.replace(written, smaller.format(folder=tmp_path))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={**ENVIRONMENT, "PATH": f"{quick_python.parent}:{ENVIRONMENT['PATH']}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "stopped at step 4 (--exit-interval)" in done.stdout
    assert "Run finished: recipe fst, 8 steps" in done.stdout
    assert re.search(r"linear_fc1\.weight +256x64 +0\.5000 +yes +yes", done.stdout)
    exported = tmp_path / "exported"
    assert (exported / "sparsity.json").is_file()
    # An engine cuts text into the ids of the training, and evaluations find the run's tokenizer.
    engines = transformers.AutoTokenizer.from_pretrained(exported)
    ours = load_tokenizer(tokenizer_file_of(exported), probe=False)
    assert tokenizer_file_of(exported).name == "tokenizer.model"
    text = "a <eod>  b\n\tdef main(self):\n"
    assert engines(text)["input_ids"] == ours.encode(text)
    assert engines.decode(ours.encode(text)) == text and engines.eos_token_id == ours.eod
    page = (tmp_path / "pictures" / "index.html").read_text()
    assert page.count("<svg") >= 6 and "Training loss against time" in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.S)
    for picture in pictures:
        ElementTree.fromstring(picture)  # well-formed, on its own
    for used in set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", page)):
        assert page.count(f'id="{used}"') == 1, used
    for resource in (r'(src|href)="(?!#)', r"@import", r"url\((?!#)"):
        assert not re.search(resource, page), f"the page loads something: {resource}"
    for picture in ("flip_rate", "loss_tokens", "all", "masks"):
        assert (tmp_path / "pictures" / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_spec_provider_example_trains(tmp_path, quick_python):
    (code,) = blocks("spec_provider.md", "python")
    (tmp_path / "example.py").write_text(code)
    # torchrun, as the page says.
    command = [str(quick_python), "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "1", "example.py"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, last, weights = re.findall(r"loss (.*) -> (.*); (\d+) sparse weights", done.stdout)[0]
    assert float(last) < float(first) - 0.5 and weights == "4"


@pytest.mark.parametrize("page", ["nn.md", "kernels.md"])
def test_the_examples_of_a_page_run(page):
    examples = blocks(page, "python")
    assert examples
    for code in examples:
        exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_every_public_kernel_has_a_row_and_an_example():
    rows = "\n".join(line for line in (DOCS / "kernels.md").read_text().splitlines() if "|" in line)
    code = "\n".join(blocks("kernels.md", "python"))
    kinds = {"Activation", "AdamW", "AmaxScales", "Heads", "Packed24", "Routes", "RowFloat8"}
    kinds |= {"TensorFigures"}
    for name in set(kernels.__all__) - kinds:
        assert re.search(rf"`[^`]*\b{name}\b", rows), f"{name}: no row"
        assert re.search(rf"\b{name}\b", code), f"{name}: no example"


@functools.cache
def _literals() -> list[str]:
    """All texts of the source, with \\0 where a value is put in."""
    found = []
    files = [*(ROOT / "megasparse").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.\d)?[sdfgr]", "\0", node.value))
    return found


def _quoted() -> list[str]:
    return re.findall(r"^> `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.M)


@pytest.mark.parametrize("message", _quoted(), ids=lambda m: m[:40])
def test_messages_in_troubleshooting_are_in_the_source(message):
    # A value may be one of the message's own words (a list's "4x4" is written {BLOCK}x{BLOCK}).
    pieces = [re.escape(piece) for piece in message.replace("4x4", "…x…").split("…")]
    pattern = re.compile("[^\0]*\0.*?".join(pieces) if len(pieces) > 1 else pieces[0], re.S)
    assert any(pattern.search(text) for text in _literals()), message


def test_there_are_messages():
    assert len(_quoted()) >= 20


GUIDES = ["megatron.md", "deepspeed.md", "parallelism.md", "reliability.md", "fp8.md"]
GUIDES += [str(path.relative_to(DOCS)) for path in PAGES if path.parent.name == "recipes"]


@pytest.mark.parametrize("page", GUIDES)
def test_flags_of_the_guides_exist(page):
    text = (DOCS / page).read_text()
    if page == "megatron.md":  # its table has a test of its own
        text = re.sub(f"{BEGIN}.*{END}", "", text, flags=re.S)
        text = re.sub(r"^\| `(torchrun|deepspeed) .*$", "", text, flags=re.M)
    known = {info.flag for info in FIELDS.values()}
    known |= {"--" + alias.replace("_", "-") for alias in ALIASES}
    known |= {"--config", "--help", "--num_gpus", "--log_level", "--hostfile", "--deepspeed_config"}
    known |= {"--no-" + info.flag[2:] for info in FIELDS.values() if info.kind is bool}
    known |= {"--fp16", "--no-bf16", "--deepspeed", "--node_rank"}  # of theirs
    known |= {"--append-eod", "--no-append-eod"}  # of tools/preprocess_data.py
    known |= {"--gpus", "--search"}  # of tools/estimate.py
    known |= {"--scale", "--output", "--jobs", "--plan", "--time-limit"}  # of the comparisons
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w(?![\w-])", text))
    assert flags <= known, flags - known


def test_the_table_of_flags_is_the_parsers():
    page = (DOCS / "megatron.md").read_text()
    assert with_table(page) == page, "python tools/flag_table.py docs/megatron.md"


def test_every_flag_is_in_the_documentation():
    text = "".join(path.read_text() for path in PAGES)
    written = set(re.findall(r"--[a-z][\w-]*", text))
    flags = {info.flag for info in FIELDS.values()} - {"--deepspeed-config"}
    assert flags | {"--deepspeed_config"} <= written, flags - written


def test_every_metric_is_explained_as_the_code_has_it():
    text = (DOCS / "metrics.md").read_text()
    for metric in METRICS:
        curve = f"`{metric.tag}`" if metric.tag else "-"
        row = f"| `{metric.key}` | {curve} | {metric.unit} | {metric.meaning} |"
        assert row in text, metric.key


def test_exit_codes_are_those_of_the_errors():
    text = (DOCS / "troubleshooting.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {kind.exit_code for kind in classes if issubclass(kind, errors.MegasparseError)}
    assert listed == codes - {1} | {errors.EXIT_PREEMPTED, errors.EXIT_NO_PROGRESS}
    assert all(f"{code} " in errors.EXIT_CODES for code in listed)


@pytest.mark.parametrize("path", [*PAGES, *FRONT], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), f"{path}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in anchors, f"{path}: {target}; there are {sorted(anchors)}"


def _named_paths(text: str) -> set[str]:
    """Files and folders of the repository that a page names, without placeholders in capitals."""
    text = re.sub(r"\]\([^)]*\)", "", text)  # links have a test of their own
    text = re.sub(r"^- `python -m .*? replaces .*$", "", text, flags=re.M)  # old names in changes
    areas = "megasparse|launch|tools|tests|configs|docs"
    found = re.findall(rf"(?<![\w/.-])((?:{areas})/[\w./-]*[\w/])", text)
    modules = re.findall(r"-m ((?:tools|megasparse)(?:\.\w+)+)", text)
    modules = [module.replace(".", "/") for module in modules]
    return {path for path in [*found, *modules] if not re.search(r"[A-Z]{4}", path)}


def _there(path: str) -> bool:
    return (ROOT / path).exists() or (ROOT / f"{path}.py").exists()


@pytest.mark.parametrize("path", [*PAGES, *FRONT], ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_and_modules_are_there(path):
    missing = {named for named in _named_paths(path.read_text()) if not _there(named)}
    removed = {"megasparse/train/preflight", "docs/benchmarks.md"}  # the changelog says so
    assert not missing - (removed if path.name == "CHANGELOG.md" else set()), missing


def test_every_page_is_in_the_index_and_the_readme_is_short():
    index = (DOCS / "README.md").read_text()
    for page in PAGES:
        if page.parent == DOCS and page.name != "README.md":
            assert f"]({page.name})" in index, page.name
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_levels_are_those_that_the_architecture_tests():
    text = (DOCS / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*?) \|", text, re.M)
    told = {name: int(level) for level, names in rows for name in re.findall(r"`(\w+)/?`", names)}
    assert told.pop("progress") > LEVELS["progress"]  # below the first row, which says so
    assert told.items() <= LEVELS.items()
    folders = {name for name in LEVELS if (ROOT / "megasparse" / name).is_dir()}
    assert folders <= told.keys(), folders - told.keys()


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def test_numbers_of_the_first_table_stand_in_its_results():
    text = (ROOT / "README.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if "](tools/results/" in line]
    rows = [cells for cells in rows if len(cells) == 5]
    assert len(rows) == 5
    for what, dense, sparse, speed, loss in rows:
        files = re.findall(r"\]\((tools/results/[^)]+)\)", what)
        results = "\n".join((ROOT / file).read_text() for file in files)
        for number in re.findall(r"\d[\d,]*\.\d+|\d{2,3},\d{3}", dense + sparse + loss):
            assert re.search(rf"(?<![\d,.]){re.escape(number)}(?!\d)", results), number
        baselines = dict(re.findall(r"(FP8|BF16) ([\d,.]*\d)", dense))
        ours = re.findall(r"[\d,.]*\d (?=tokens/s|ms)", sparse)
        for ratio, kind in re.findall(r"\*\*([\d.]+)x\*\* (FP8|BF16)", speed):
            pair = _number(ours[0]) / _number(baselines[kind])
            expected = 1 / pair if " ms" in sparse else pair
            assert ratio == f"{expected:.2f}", what


def _numbers(text: str) -> list[float]:
    """Those with a fraction or thousands; dates and counts are none."""
    return [_number(n) for n in re.findall(r"[+-]?\d+(?:,\d{3}|\.\d+)(?:e-\d+)?", text)]


@pytest.mark.parametrize("page", ["results.md", "parallelism.md"])
def test_numbers_of_tables_stand_in_the_results_that_their_section_links(page):
    checked = 0
    for section in re.split(r"^## ", (DOCS / page).read_text(), flags=re.M):
        files = re.findall(r"\]\(\.\./(tools/results/[\w-]+\d\.md)\)", section)
        results = {n for file in files for n in _numbers((ROOT / file).read_text())}
        table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
        told = _numbers(re.sub(r"\]\([^)]*\)", "", table))
        assert set(told) <= results, set(told) - results
        checked += len(told)
    assert checked >= 8
