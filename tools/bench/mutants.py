"""Small faults put into the code one at a time, and whether the tests notice.

A mutant is one change of one expression: a comparison, an operator, a constant, a condition, a
call that is left out. A sample is drawn with a seed. First every test is followed once, to know
which lines it executes (`--map`, kept for later calls). Then each mutant is judged in a fork of a
process that has imported everything: its function's code is exchanged, and the tests that execute
its line run, the quickest first, until one fails. A test that fails is run alone with the fault and
without it before it counts. Mutants that run at import are judged in a process that imports anew.
`--jobs` of them are judged at once, in the order of the draw.

    python -m tools.bench.mutants --count 100 --map map.json --output mutants.json

What no test notices is listed at the end; a person says which of them change no behaviour.
"""

from __future__ import annotations

import argparse
import compileall
import gc
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text
from tests.order import place
from tools.bench.mutation.executed import follow, load_map, replace, unfollowed
from tools.bench.mutation.forks import import_everything
from tools.bench.mutation.judge import Judge, exchangeable
from tools.bench.mutation.places import ROOT, Mutant, mutants
from tools.bench.mutation.workers import Worker, ask

VERDICTS = ("noticed", "survived", "not reached")
COPIED = ("megasparse", "tests", "tools", "launch", "configs", "docs")
# Folders of tests that execute the areas; others test kernels, data, flags, and real launchers.
JUDGES = (
    "sparsity", "optim", "megatron", "checkpoint", "convert", "compress", "estimate", "preflight",
    "tools", "distillation", "train", "nn", "fp8", "parallel/test_consistency.py",
    "parallel/test_details.py", "parallel/test_resume.py", "launch/test_inference.py",
)  # fmt: skip
# Real experiments: long, and they run what tests of training run.
NO_JUDGES = ("tools/bench", "tools/experiments", "tools/results", "tools/test_search_decay.py")


def test_files() -> list[str]:
    """The files that may notice, those of the areas themselves first."""
    tests = ROOT / "tests"
    found: list[Path] = []
    for name in JUDGES:
        one = tests / name
        found += sorted(one.rglob("test_*.py")) if one.is_dir() else [one]
    others = tuple(str(tests / name) for name in NO_JUDGES)
    return [str(path.relative_to(ROOT)) for path in found if not str(path).startswith(others)]


def draw(count: int, seed: int, chosen: str = "") -> list[dict[str, Any]]:
    """A sample of mutants, as rows without a verdict."""
    everything = [one for one in mutants() if one.module.startswith(f"megasparse/{chosen}")]
    sample = random.Random(seed).sample(everything, min(count, len(everything)))
    print(f"{len(sample)} of {len(everything)} mutants", flush=True)
    return [asdict(one) for one in sample]


class _Answers:
    """What a worker does: `("follow", file)` and `("judge", row)`.

    Args:
        folder: its copy of the tree.
        imported: this process has imported the project from there.
    """

    def __init__(self, folder: Path, imported: bool, map_path: Path, args: Any) -> None:
        self.imported = imported
        self._folder, self._map_path, self._args = folder, map_path, args
        self._judge: Judge | None = None

    def __call__(self, question: tuple[str, Any]) -> Any:
        """Answer one question."""
        kind, what = question
        if kind == "follow":
            return follow(self._folder, what, self._args.limit)
        if self._judge is None:
            tests = load_map(self._map_path)["tests"]
            self._judge = Judge(self._folder, tests, self._args.budget)
            if not self.imported:
                _be_in(self._folder)
                sys.dont_write_bytecode = True  # of a file that is changed and back at once
        begin = time.monotonic()
        verdict = self._judge.judge(_mutant(what), self.imported)
        return *verdict, round(time.monotonic() - begin, 1)


def main(argv: list[str] | None = None) -> int:
    """Draw, judge and write; 0 whatever was found."""
    args = _arguments(argv)
    until = time.monotonic() + args.seconds
    output = args.output.resolve()
    map_path = (args.map or args.output.with_suffix(".map.json")).resolve()
    if output.exists():
        rows = json.loads(output.read_text())
    else:
        rows = draw(args.count, args.seed, args.area)
    os.environ |= {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = _copy(ROOT, Path(name) / "imported")
        compileall.compile_dir(folder, quiet=1)
        folders = [_copy(folder, Path(name) / str(number)) for number in range(args.jobs)]
        for module in ("torch", "numpy", "pytest", "transformers"):
            importlib.import_module(module)
        # These are forked first: they import the project anew for every mutant.
        anew = [Worker(_Answers(one, False, map_path, args)) for one in folders]
        _be_in(folder)
        import_everything(folder)
        exchanged = [exchangeable(folder, _mutant(row)) for row in rows]
        gc.freeze()  # forks would copy what their collector looks at
        warm = [Worker(_Answers(folder, True, map_path, args)) for _ in range(args.jobs)]
        try:
            _follow_all(folder, warm, map_path)
            _judge_all(rows, exchanged, warm, anew, until, output)
        finally:
            for worker in (*warm, *anew):
                worker.end()
    return _report(rows)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--area", default="", help="draw from megasparse/AREA alone")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for a mutant")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds to follow one file")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="mutants at once"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no mutant after this time"
    )
    parser.add_argument("--map", type=Path, help="what tests execute; made where it is missing")
    parser.add_argument("--output", type=Path, required=True, help="JSON, written as it goes")
    return parser.parse_args(argv)


def _copy(tree: Path, folder: Path) -> Path:
    for part in COPIED:
        shutil.copytree(tree / part, folder / part)
    for file in filter(Path.is_file, tree.iterdir()):
        shutil.copy(file, folder)
    return folder


def _follow_all(folder: Path, workers: list[Worker], map_path: Path) -> None:
    """Follow all files of tests that are new or changed; the map is written after each."""
    known = load_map(map_path)

    def told(question: tuple[str, str], tests: dict[str, Any]) -> None:
        replace(known, folder, question[1], tests)
        write_text(map_path, json.dumps(known))
        took = sum(one["seconds"] for one in tests.values())
        print(f"{question[1]}: {len(tests)} tests, {took:.1f} s", flush=True)

    files = unfollowed(known, folder, test_files())
    files.sort(key=lambda file: place(folder / file))
    ask(workers, [("follow", file) for file in files], told, len(workers))


def _judge_all(
    rows: list[dict[str, Any]],
    exchanged: list[bool],
    warm: list[Worker],
    anew: list[Worker],
    until: float,
    output: Path,
) -> None:
    numbers = {id(row): number for number, row in enumerate(rows)}

    def told(question: tuple[str, dict[str, Any]], verdict: tuple[str, str, float]) -> None:
        row = question[1]
        row["verdict"], row["test"], row["seconds"] = verdict
        write_text(output, json.dumps(rows, indent=1))
        print(f"{verdict[0]:11} {_place(row)} {verdict[1]} ({verdict[2]:.0f} s)", flush=True)

    def fits(question: tuple[str, dict[str, Any]], worker: Worker) -> bool:
        return (worker in warm) == exchanged[numbers[id(question[1])]]

    questions = [("judge", row) for row in rows if "verdict" not in row]
    ask([*warm, *anew], questions, told, len(warm), fits, until)


def _report(rows: list[dict[str, Any]]) -> int:
    found = {
        verdict: [row for row in rows if row.get("verdict") == verdict] for verdict in VERDICTS
    }
    for verdict in ("survived", "not reached"):
        print(f"\n{verdict}: {len(found[verdict])}")
        for row in sorted(found[verdict], key=_place):
            print(f"  {_place(row)}")
    judged = len(found["noticed"]) + len(found["survived"])
    print(f"\nnoticed: {len(found['noticed'])} of {judged} that tests reach")
    print(f"reached by no test on this machine: {len(found['not reached'])}")
    print(f"not judged, for want of time: {len(rows) - judged - len(found['not reached'])}")
    return 0


def _mutant(row: dict[str, Any]) -> Mutant:
    return Mutant(**{name: row[name] for name in Mutant.__dataclass_fields__})


def _place(row: dict[str, Any]) -> str:
    return f"{row['module']}:{row['line']} {row['old']!r} -> {row['new']!r}"


def _be_in(folder: Path) -> None:
    """Import from a copy of the tree from now on; what is imported of the project is forgotten."""
    os.chdir(folder)
    others = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    sys.path[:] = [str(folder), *others]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [p for p in paths if p and Path(p).resolve() != ROOT]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *paths])
    for name in [name for name in sys.modules if name.split(".")[0] in ("megasparse", "tests")]:
        del sys.modules[name]


if __name__ == "__main__":
    sys.exit(main())
