"""The laws of the design, tested: imports go down, one door a dependency, no cycles, sizes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.order import LONGEST, TESTS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megasparse"
FILES = sorted(PACKAGE.rglob("*.py"))
# The commands, above the package: nothing of it imports them.
COMMANDS = sorted(path for name in ("tools", "launch") for path in (ROOT / name).rglob("*.py"))

# What a module may import of its own package: areas of lower levels, and its own area.
LEVELS = {
    "progress": -1,  # of a terminal, which the lines of the log go around
    "errors": 0, "log": 0, "atomic_files": 0, "timer": 0,
    "input_files": 0, "extras": 0,
    "cli": 1, "tensor_files": 1, "config": 1, "kernels": 1,
    "fp8": 2, "data": 2, "distributed": 2, "metrics": 2,
    "sparsity": 4, "compress": 4,
    "nn": 5, "megatron": 5, "optim": 5, "convert": 5, "estimate": 5,
    "checkpoint": 6,
    "preflight": 7, "inference": 7,
    "train": 8,
    "tools": 9, "launch": 9, "__main__": 9,
}  # fmt: skip

# Only these files (or folders) may import the dependency. Benchmarks measure the libraries' own
# layers and casts as baselines, which no door of the package offers.
DOORS = {
    "megatron": [
        "megasparse/megatron",
        "tools/bench/parts/te_baseline.py",
        "tools/bench/parts/single_layer.py",
        "tools/bench/preprocess.py",
    ],
    "deepspeed": ["megasparse/train/engine/deepspeed.py"],
    "transformer_engine": [
        "megasparse/fp8/transformer_engine.py",
        "tools/bench/parts/te_baseline.py",
        "tools/bench/parts/operand_cases.py",
    ],
    "transformer_engine_torch": ["megasparse/fp8/transformer_engine.py"],
    "triton": [
        "megasparse/kernels/device/*.py",
        "megasparse/kernels/*/triton*.py",
        "tools/bench/kernels.py",
    ],
    "sentencepiece": [
        "megasparse/data/tokenizers/tokenizer.py",
        "megasparse/data/tokenizers/spm_*.py",
    ],
    "tokenizers": [
        "megasparse/data/tokenizers/hf_tokenizer.py",
        "megasparse/data/tokenizers/spm_json.py",
        "megasparse/data/tokenizers/bpe_files.py",
    ],
    "pyarrow": ["megasparse/data/inputs.py"],
    "jinja2": ["megasparse/data/chat/template.py"],
    "zstandard": ["megasparse/data/inputs.py"],
    "tqdm": ["megasparse/progress.py"],
    # Which linears are sparse is asked of the recipe: `recipe.matches(name)`.
    "fnmatch": ["megasparse/sparsity/recipe.py"],
    "yaml": ["megasparse/config/loader.py"],
    "safetensors": ["megasparse/tensor_files.py"],
    "tensorboard": ["megasparse/metrics/trackers.py"],
    "wandb": ["megasparse/metrics/trackers.py"],
    "mlflow": ["megasparse/metrics/trackers.py"],
    "lm_eval": ["megasparse/inference/eval_harness.py"],
    "matplotlib": ["megasparse/metrics/plots.py"],
    "transformers": [
        "megasparse/nn/callbacks.py",
        "tools/bench/parts/family_models.py",
        "tools/bench/parts/llama.py",
    ],
    "lightning": ["megasparse/nn/callbacks.py"],
    "torchao": ["tools/bench/nn_llama.py"],
}

# Only these files import the package inside functions, so that they start without torch: a mistake
# in a flag is told within a second, and a tool that starts ranks does not load what they need.
LATE = ["launch/pretrain.py", "tools/bench/parts/short_runs.py"]

MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 120  # a Triton kernel is one function


def _imports(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append((node.module or "", node))
            found += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return found


def _area(module: str) -> str:
    """The area of a module's name: of the package one level below it; empty for its root."""
    top, *rest = module.split(".")
    if top != PACKAGE.name:
        return top
    return rest[0] if rest else ""


@pytest.mark.parametrize("path", [*FILES, *COMMANDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_module_keeps_the_laws(path: Path):
    source = path.read_text()
    tree = ast.parse(source)
    relative = path.relative_to(ROOT)
    area = _area(_name(path)) or "__init__"
    limit = MAX_MODULE_LINES
    assert len(source.splitlines()) <= limit, f"{relative} has grown past {limit} lines"
    assert ast.get_docstring(tree), f"{relative} opens without its idea"

    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    for module, node in _imports(tree):
        top = module.split(".")[0]
        if top in ("megasparse", "tools", "launch"):
            late = str(relative) in LATE
            assert late or id(node) not in inside_functions, f"{relative}: {module} in a function"
            other = _area(module)
            if area != "__init__" and other not in ("", area, "__version__"):
                assert LEVELS[other] < LEVELS[area], f"{relative} ({area}) imports {module}"
        if module.startswith("torch.utils.tensorboard"):
            top = "tensorboard"
        if top in DOORS:
            assert any(
                relative.match(door) or str(relative).startswith(door + "/") for door in DOORS[top]
            ), f"{relative} imports {top}; its door is {DOORS[top]}"

    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (function.end_lineno or 0) - function.lineno + 1
            kernel = any(relative.match(door) for door in DOORS["triton"])
            most = MAX_KERNEL_LINES if kernel else MAX_FUNCTION_LINES
            assert length <= most, f"{relative}: {function.name} has {length} lines"


def test_no_import_cycles():
    graph: dict[str, set[str]] = {}
    modules = {_name(path): path for path in [*FILES, *COMMANDS]}
    for name, path in modules.items():
        wanted = {module for module, _ in _imports(ast.parse(path.read_text()))}
        graph[name] = {module for module in wanted if module in modules and module != name}
        # `from package import name` in a module of that package is an edge to the package only if
        # the package's __init__ defines more than re-exports; importing a sibling is the edge.
        graph[name] -= {name.rsplit(".", 1)[0]}
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> None:
        assert node not in trail, " -> ".join([*trail[trail.index(node) :], node])
        if node not in done:
            for other in sorted(graph[node]):
                visit(other, [*trail, node])
            done.add(node)

    for name in graph:
        visit(name, [])


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _operations() -> list[Path]:
    """The folders of kernels: all but functions for kernels."""
    folders = (PACKAGE / "kernels").iterdir()
    return sorted(f for f in folders if f.is_dir() and f.name not in ("device", "__pycache__"))


@pytest.mark.parametrize("folder", _operations(), ids=lambda folder: folder.name)
def test_every_kernel_has_a_reference(folder: Path):
    names = {path.name for path in folder.glob("*.py")}
    assert {"__init__.py", "reference.py"} <= names, f"{folder.name}: no door or no definition"
    assert names & {"triton.py", "cusparselt.py"}, f"{folder.name}: no fast version"
    door = ast.parse((folder / "__init__.py").read_text())
    public = [n for n in door.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
    assert public, f"{folder.name}: its door has no function"


@pytest.mark.parametrize("folder", _operations(), ids=lambda folder: folder.name)
def test_definitions_know_no_kernel(folder: Path):
    """And give values back: a function without a result could only fill memory."""
    tree = ast.parse((folder / "reference.py").read_text())
    for module, _ in _imports(tree):
        assert "triton" not in module, f"{folder.name}/reference.py imports {module}"
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            result = function.returns
            assert result is not None and ast.unparse(result) != "None", function.name


def test_nothing_prints_or_pickles_in_the_package():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "eval", "exec"), f"{path}: {node.func.id}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "marshal", "shelve"} & set(names), path


@pytest.mark.parametrize("path", [*FILES, *COMMANDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_public_is_documented(path: Path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if path in COMMANDS and node.name in ("main", "parse", "parse_args"):
                continue  # the same in every command: its exit code, its flags
            assert ast.get_docstring(node), f"{path}: {node.name}"


def test_the_formatter_is_off_for_tables_of_constants_alone():
    mark = "# fmt: " + "skip"
    for path in [*FILES, *COMMANDS, *sorted((ROOT / "tests").rglob("*.py"))]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            inside = line.endswith(mark) and line.startswith(" ")
            assert not inside, f"{path}:{number}: within a function or a class"


def test_the_longest_tests_are_where_their_order_says():
    missing = [name for name in LONGEST if not (TESTS / name).exists()]
    assert not missing and len(set(LONGEST)) == len(LONGEST), missing


def test_tests_load_the_commands_as_modules():
    own = Path(__file__)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = "" if path == own else path.read_text()
        for trick in ("sys.path.insert", "syspath_prepend", "spec_from_file_location"):
            assert trick not in text, f"{path}: {trick}"


def test_top_level_shows_only_what_belongs_there():
    allowed = {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
        "containers",
        "Makefile",
        "setup.py",
        "LICENSE",
        "pyproject.toml",
        "megasparse",
        "launch",
        "configs",
        "docs",
        "tools",
        "tests",
        # made by work, ignored by git
        "megasparse.egg-info",
        "runs",
        "build",
        "dist",
    }
    visible = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}
    assert visible <= allowed, visible - allowed
