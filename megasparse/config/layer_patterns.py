"""Settings that say which layers do something, and how wide a window is: Megatron's notation.

Megatron evaluates a list as Python; here numbers, lists, `+` and `*` are parsed. Every spelling of
the same has one text, so that settings are equal where what they say is.
"""

from __future__ import annotations

import ast
import operator
from typing import Any

WINDOW_FORM = "tokens before and after, such as 4095,0 (a causal model sees none after)"
PATTERN_FORM = "a whole number from 1 on, or a list of 0 and 1 such as '([1]*5+[0])*4'"
_MAX_ITEMS = 10_000  # layers that a model may have
_OPERATORS: dict[type[ast.operator], Any] = {ast.Add: operator.add, ast.Mult: operator.mul}


def window_text(value: Any) -> str:
    """A sliding window as `before,0`, from a text or a pair.

    Raises:
        ValueError: it is none.
    """
    items = value if isinstance(value, (list, tuple)) else str(value).strip(" ()[]").split(",")
    before, after = (int(str(item)) for item in items)
    if before < 0 or after != 0:
        raise ValueError
    return f"{before},0"


def pattern_text(value: Any) -> str:
    """Layers as N (every N-th) or as a list, from a text, a number or a list.

    Raises:
        ValueError: it is neither.
    """
    found = _parsed(str(value))
    if isinstance(found, int):
        if found < 1:
            raise ValueError
        return str(found)
    if not found or len(found) > _MAX_ITEMS or any(one not in (0, 1) for one in found):
        raise ValueError
    return str(found).replace(" ", "")


def layers_of(pattern: str | None, num_layers: int, nth: bool) -> list[bool]:
    """For each layer whether the pattern has a 1.

    Args:
        pattern: of `pattern_text`; None: no layer is an exception.
        nth: what an N says of every N-th layer; of the others the opposite.

    Raises:
        ValueError: a list for another number of layers.
    """
    if pattern is None:
        return [not nth] * num_layers
    if pattern.isdecimal():
        every = int(pattern)
        return [(number % every == 0) == nth for number in range(1, num_layers + 1)]
    found = _parsed(pattern)
    if len(found) != num_layers:
        raise ValueError(f"has {len(found)} items, expected num_layers {num_layers}")
    return [bool(item) for item in found]


def pattern_of(layers: list[bool], nth: bool) -> str | None:
    """The shortest pattern that `layers_of` reads as these layers."""
    for pattern in (None, *(str(every) for every in range(1, len(layers) + 1))):
        if layers_of(pattern, len(layers), nth) == layers:
            return pattern
    return pattern_text([int(layer) for layer in layers])


def _parsed(text: str) -> Any:
    """The number or the list that a text says."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= _MAX_ITEMS:
        return node.value
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        sizes = [len(side) if isinstance(side, list) else side for side in (left, right)]
        if sizes[0] * sizes[1] > _MAX_ITEMS**2:
            raise ValueError
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError
