"""Where a module can be changed in one expression.

A comparison, an operator, a constant, a condition, a call that is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
AREAS = ("sparsity", "optim", "megatron", "checkpoint", "convert")
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

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """The body; that a dataclass is frozen changes nothing where nobody assigns."""
        for statement in node.body:
            self.visit(statement)

    def visit_keyword(self, node: ast.keyword) -> None:
        """Not `zip(..., strict=True)`, which says that lengths are equal."""
        if node.arg != "strict":
            self.visit(node.value)

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
            yield from mutants_of(str(path.relative_to(ROOT)), path.read_text())


def mutants_of(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, by its path within the repository."""
    return _Places(module, source).found


@dataclass(frozen=True)
class Surroundings:
    """What a mutant lies in.

    Attributes:
        function: (name, first line) of the outermost function whose body it is in, as in
            its code object; None for what runs when the module is imported.
        lines: the lines of its statement; of a compound statement, those of its head.
    """

    function: tuple[str, int] | None
    lines: range


def surroundings(source: str, mutant: Mutant) -> Surroundings:
    """Where in a module a mutant is."""
    function: tuple[str, int] | None = None
    lines = range(mutant.line, mutant.line + 1)
    body: list[ast.stmt] = ast.parse(source).body
    while body:
        inside = [s for s in body if _first(s) <= mutant.line <= (s.end_lineno or s.lineno)]
        if not inside:
            break
        statement = inside[0]
        parts = _bodies(statement)
        starts = [_first(part[0]) for part in parts if part]
        head_ends = min([start - 1 for start in starts] or [statement.end_lineno or 0])
        lines = range(_first(statement), max(head_ends, statement.lineno) + 1)
        if mutant.line <= head_ends or not starts:
            break
        if function is None and isinstance(statement, ast.FunctionDef):
            function = (statement.name, _first(statement))
        body = [child for part in parts for child in part]
    return Surroundings(function, lines)


def _first(node: ast.stmt) -> int:
    """The first line, of decorators too."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(one.lineno for one in decorators)])


def _bodies(statement: ast.stmt) -> list[list[ast.stmt]]:
    found = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
    found += [handler.body for handler in getattr(statement, "handlers", [])]
    found += [case.body for case in getattr(statement, "cases", [])]
    return found
