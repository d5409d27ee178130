"""Small faults put into the code one at a time, and whether the tests beside it notice.

A mutant is one change of one expression: a comparison, an operator, a constant, a condition, a
call that is left out. A sample is drawn with a seed. Each is judged in a process of its own, a fork
of one that has torch and its libraries, by the tests that mirror its module: `test_NAME*.py` in the
mirrored folder, else all of that folder. Those that nobody notices are listed; a person says which
of them change no behaviour.

    python -m tools.bench.mutants --count 40 --output mutants.json
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megasparse.atomic_files import write_text

ROOT = Path(__file__).parents[2]
AREAS = ("sparsity", "optim", "megatron", "checkpoint", "convert")
COPIED = ("megasparse", "tests", "tools", "launch", "configs")
_COMPARED = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_COMPUTED = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*",
    ast.BitOr: "&", ast.BitAnd: "|", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """`new` in place of characters `start` to `end` of a module.

    Attributes:
        module: path within the repository.
        line: where it is, from 1.
        old, new: source text.
    """

    module: str
    line: int
    start: int
    end: int
    old: str
    new: str


class _Places(ast.NodeVisitor):
    """All mutants of one module."""

    def __init__(self, module: str, source: str) -> None:
        self.found: list[Mutant] = []
        self._module, self._source = module, source
        lines = source.encode().splitlines(keepends=True)
        self._starts = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
        self.visit(ast.parse(source))

    def _offset(self, line: int, column: int) -> int:
        return len(self._source.encode()[: self._starts[line - 1] + column].decode())

    def _add(self, node: ast.expr | ast.stmt, new: str) -> None:
        start = self._offset(node.lineno, node.col_offset)
        end = self._offset(node.end_lineno or node.lineno, node.end_col_offset or 0)
        old = self._source[start:end]
        self.found.append(Mutant(self._module, node.lineno, start, end, old, new))

    def _text(self, node: ast.AST) -> str:
        return f"({ast.get_source_segment(self._source, node)})"

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Bodies and defaults; no annotations."""
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """The value alone."""
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Words of messages are no behaviour."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """What cannot be otherwise."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Texts."""

    def visit_Expr(self, node: ast.Expr) -> None:
        """A call whose result nobody takes is left out."""
        if isinstance(node.value, ast.Call):
            if not ast.unparse(node.value.func).startswith("logger"):
                self._add(node, "pass")
                self.generic_visit(node)
        elif not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """`<` for `<=`, `==` for `!=` ..."""
        new = _COMPARED.get(type(node.ops[0]))
        if len(node.ops) == 1 and new:
            self._add(node, f"{self._text(node.left)} {new} {self._text(node.comparators[0])}")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """`+` for `-` ..."""
        new = _COMPUTED.get(type(node.op))
        if new and not isinstance(node.left, ast.Constant | ast.JoinedStr):
            self._add(node, f"{self._text(node.left)} {new} {self._text(node.right)}")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """`and` for `or`."""
        new = " or " if isinstance(node.op, ast.And) else " and "
        self._add(node, new.join(self._text(value) for value in node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Without `not`, without a sign."""
        if isinstance(node.op, ast.Not | ast.USub):
            self._add(node, self._text(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Another truth, the next number."""
        if isinstance(node.value, bool):
            self._add(node, repr(not node.value))
        elif isinstance(node.value, int):
            self._add(node, repr(node.value + 1))
        elif isinstance(node.value, float):
            self._add(node, repr(node.value * 2 + 1))


def mutants() -> Iterator[Mutant]:
    """All mutants of the areas."""
    for area in AREAS:
        for path in sorted((ROOT / "megasparse" / area).rglob("*.py")):
            module = str(path.relative_to(ROOT))
            yield from _Places(module, path.read_text()).found


def judges(module: str) -> list[str]:
    """The tests that mirror a module."""
    path = Path(module)
    folder = ROOT / "tests" / path.parent.relative_to("megasparse")
    while not folder.is_dir() or not list(folder.glob("test_*.py")):
        folder = folder.parent
    own = sorted(folder.glob(f"test_{path.stem}*.py"))
    return [str(test.relative_to(ROOT)) for test in own or sorted(folder.glob("test_*.py"))]


def judge(folder: Path, tests: list[str], limit: float) -> str:
    """Run tests in a fork: noticed, survived, or timeout (noticed, too)."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        os.environ["PYTHONPATH"] = str(folder)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
        os._exit(int(pytest.main([*options, *tests])))
    end = time.monotonic() + limit
    status: int | None = None
    while status is None and time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return "timeout"
    return "survived" if os.waitstatus_to_exitcode(status) == 0 else "noticed"


def main(argv: list[str] | None = None) -> int:
    """Draw, judge and write; 0 whatever was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=40, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one mutant's tests")
    parser.add_argument("--output", type=Path, required=True, help="JSON, written as it goes")
    args = parser.parse_args(argv)
    everything = list(mutants())
    chosen = random.Random(args.seed).sample(everything, min(args.count, len(everything)))
    print(f"{len(chosen)} of {len(everything)} mutants", flush=True)
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch  # noqa: F401  what forks need not import again; nothing of the project

    found: list[dict[str, object]] = []
    clean: dict[tuple[str, ...], str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        for part in COPIED:
            shutil.copytree(ROOT / part, folder / part)
        for file in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / file, folder)
        for mutant in chosen:
            tests = judges(mutant.module)
            if tuple(tests) not in clean:
                clean[tuple(tests)] = judge(folder, tests, args.limit)
            path = folder / mutant.module
            source = path.read_text()
            verdict = f"not judged: the tests alone: {clean[tuple(tests)]}"
            if clean[tuple(tests)] == "survived":
                write_text(path, source[: mutant.start] + mutant.new + source[mutant.end :])
                verdict = judge(folder, tests, args.limit)
                write_text(path, source)
            found.append({**asdict(mutant), "tests": tests, "verdict": verdict})
            write_text(args.output, json.dumps(found, indent=1))
            print(f"{verdict:9} {mutant.module}:{mutant.line} {mutant.old!r} -> {mutant.new!r}")
            sys.stdout.flush()
    judged = [one for one in found if not str(one["verdict"]).startswith("not judged")]
    noticed = sum(one["verdict"] != "survived" for one in judged)
    print(f"noticed: {noticed} of {len(judged)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
