"""No file that a run reads can make it run code, and no run listens to the network."""

from __future__ import annotations

import ast
import os
import pickle
import time
from pathlib import Path

import pytest

from tests import forked
from tests.reliability.malicious import attacks, attempt, pickled, prepare_base
from tests.reliability.runs import flags

ROOT = Path(__file__).parents[2]
FILES = sorted(p for d in ("megasparse", "launch", "tools") for p in (ROOT / d).rglob("*.py"))
MODULES = {
    "pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "imp",
    "importlib",
    "code",
    "codeop",
    "runpy",
    "joblib",
}
HARMLESS = {"importlib.metadata"}  # tells versions
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "os.system", "os.popen",
    "np.fromfile", "yaml.unsafe_load", "yaml.full_load", "pydoc.locate", "builtins.eval",
}  # fmt: skip
# A conversion tool may read foreign `.pt` files, with weights_only=True; nothing else may.
SAMPLE = {
    "manifest-pickle", "tensors-torch-save", "name-parent", "rng-pickle", "metrics-pickle",
    "index-document", "megatron-index", "tok.model",
}  # fmt: skip
# Modules that these files import are named in the code, not in what they read.
NAMED_IN_THE_CODE = {
    "megasparse/__main__.py": {"import runpy"},  # the package's own scripts
    "megasparse/data/inputs.py": {"import importlib"},  # zstandard, pyarrow, where they are used
    "megasparse/extras.py": {"import importlib.util"},  # whether a library is installed
    "megasparse/preflight/settings.py": {"import importlib.util"},  # whether a tracker is
    # Files of the formats of other libraries, which are written and, without code, read.
    "megasparse/convert/megatron/torch_dist_write.py": {"torch.save(weights_only=None)"},
    "megasparse/nn/callbacks.py": {"torch.save(weights_only=None)"},
    # Faults that are put into the project's own code, to see which tests notice.
    "tools/bench/mutants.py": {"import importlib"},
    "tools/bench/mutation/executed.py": {"import importlib"},
    "tools/bench/mutation/judge.py": {"compile(weights_only=None)"},
    "tools/bench/mutation/forks.py": {"import importlib"},
}
# Files that read without `megasparse/input_files.py`, and what.
READ_OTHERWISE = {
    "megasparse/input_files.py": "it is the door",
    "megasparse/checkpoint/lock_owner.py": "/proc",
    "megasparse/distributed/hosts.py": "/proc",
    "megasparse/distributed/interfaces.py": "/proc",
    "megasparse/distributed/launchers.py": "/proc",
    "megasparse/preflight/facts.py": "/proc, and the package itself",
    "megasparse/data/corpus.py": "files of Python's library, for the corpus of the quickstart",
    "megasparse/data/chat/corpus.py": "the same, for the conversations of the example",
    "megasparse/data/inputs.py": "texts to tokenize, which may come through a pipe",
    "launch/evaluate.py": "a text, which may come through a pipe",
    "launch/generate.py": "prompts, which may come through a pipe",
    "tools/flag_table.py": "a page of the documentation",
    "tools/search_decay.py": "its own records",
}
OF_THE_PROJECT = ("tools/bench/", "tools/experiments/", "tools/results/")
MAY_TORCH_LOAD = {
    "tools/convert_checkpoint.py", "megasparse/convert", "megasparse/nn/callbacks.py"
}  # fmt: skip


def offences(tree: ast.AST) -> list[str]:
    """Everything in a module that could run what a file says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            found += [
                f"import {n}"
                for n in names
                if n and n.split(".")[0] in MODULES and n not in HARMLESS
            ]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in CALLS or (isinstance(node.func, ast.Name) and name in NAMES):
            found.append(f"{name}(weights_only={keywords.get('weights_only')})")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            found.append(f"{name} with allow_pickle")
        if name == "yaml.load" and "Safe" not in keywords.get("Loader", "") + "".join(
            ast.unparse(base) for base in _bases(tree, keywords.get("Loader", ""))
        ):
            found.append("yaml.load without a safe loader")
        if keywords.get("shell") == "True":
            found.append(f"{name} with a shell")
    return found


def _bases(tree: ast.AST, name: str) -> list[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node.bases
    return []


def test_files_are_read_where_pipes_and_devices_are_refused():
    """By `read_regular` and `open_regular`: a pipe would be waited for, a device is endless."""
    found = {}
    for path in FILES:
        relative = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            # What measures and experiments read, they have written.
            if not isinstance(node, ast.Call) or relative.startswith(OF_THE_PROJECT):
                continue
            function, call = ast.unparse(node.func), ast.unparse(node)
            opened = function == "open" and not set("wax+") & set(call.partition(",")[2][:6])
            if opened or function.rpartition(".")[2] in ("read_text", "read_bytes"):
                found[relative] = call
    assert found.keys() == READ_OTHERWISE.keys(), found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_syntax_tree_holds_nothing_that_runs_files(path):
    found = offences(ast.parse(path.read_text()))
    relative = str(path.relative_to(ROOT))
    if any(relative.startswith(place) for place in MAY_TORCH_LOAD):
        found = [entry for entry in found if entry != "torch.load(weights_only=True)"]
    found = [entry for entry in found if entry not in NAMED_IN_THE_CODE.get(relative, ())]
    assert not found, f"{relative}: {found}"


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from marshal import loads", "torch.load('x')", "eval('1')",
     "yaml.load(t, Loader=yaml.Loader)", "class L(yaml.Loader): pass\nyaml.load(t, Loader=L)",
     "np.load('x', allow_pickle=True)", "subprocess.run('x', shell=True)", "__import__('os')",
     "importlib.import_module(name)\nimport importlib"],
)  # fmt: skip
def test_the_walk_sees_each_of_these(source):
    assert offences(ast.parse(source))


def test_the_payload_is_live(tmp_path):
    pickle.loads(pickled(tmp_path))
    assert (tmp_path / "marker").exists()


def test_no_malicious_file_runs_anything(tmp_path):
    """A sample of them; `tools.bench.soak malicious` tries all."""
    base = tmp_path / "base"
    base.mkdir()
    prepare_base(base)
    assert len(attacks()) >= 25
    chosen = [attack for attack in attacks() if attack.name in SAMPLE]
    assert len(chosen) == len(SAMPLE)
    wrong = [line for attack in chosen for line in attempt(attack, base, tmp_path / attack.name)]
    assert not wrong, "\n".join(wrong)


def _listeners(pids: set[int]) -> list[str]:
    """Addresses, in hex, on which these processes listen (TCP)."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1].split(":")[0])
    return found


def test_a_run_listens_on_loopback_alone(tmp_path, dataset):
    run = flags(dataset, tmp_path / "run", "--train-iters", "100000", "--log-interval", "5")
    ranks = forked.start(run, 2, tmp_path / "log")
    end = time.monotonic() + 60
    while "step" not in (tmp_path / "log.0").read_text() if (tmp_path / "log.0").exists() else True:
        assert time.monotonic() < end and all(rank.is_alive() for rank in ranks)
        time.sleep(0.05)
    found = _listeners({rank.pid for rank in ranks})
    for rank in ranks:
        rank.kill()
    forked.wait(ranks)
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert found and set(found) <= loopback, found


def _careful() -> None:
    os.umask(0o077)


def test_the_folders_of_a_run_are_private_and_its_files_as_the_umask_says(tmp_path, dataset):
    run_dir, variables = tmp_path / "run", {"DS_ACCELERATOR": "cpu"}
    run = flags(dataset, run_dir, "--log-csv", "--log-layers", "--async-save")
    arguments = (run, variables, str(tmp_path / "log"), _careful)
    rank = forked.context().Process(target=forked.serve, args=arguments)
    rank.start()
    assert forked.wait([rank]) == [0]
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / "step-00000020"):
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    files = list(run_dir.rglob("*"))
    assert len(files) > 9
    assert [path for path in files if path.stat().st_mode & 0o077] == []
