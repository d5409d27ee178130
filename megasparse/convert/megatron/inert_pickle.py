"""A pickle read as data: its operations are followed, and no name in it is ever looked up.

What a class or a function would have made becomes a `Record` of its name, arguments and state. Of
operations those of plain values, containers and objects are known; a file with another one is
refused.
"""

from __future__ import annotations

import pickletools
from typing import Any

from megasparse.errors import CheckpointError

_MARK = object()
_CONSTANTS = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False,
}  # fmt: skip
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = {"BINPUT", "LONG_BINPUT"}
_GET = {"BINGET", "LONG_BINGET"}


class Record:
    """What stands for an object.

    Attributes:
        name: of its class or function, with the module; as the file says.
        args: that it was made with, and a state that is a tuple.
        state: its attributes.
    """

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args = name, args
        self.state: dict[str, Any] = {}


def read(data: bytes, where: str) -> Any:
    """The value that a pickle says.

    Args:
        where: of the file, for messages.

    Raises:
        CheckpointError: damaged, or with an operation that is not known.
    """
    try:
        return _Reader(where).run(data)
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises of everything
        raise CheckpointError(f"{where}: damaged: {' '.join(str(error).split())[:200]}") from None


class _Reader:
    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for operation, argument, _ in pickletools.genops(data):
            name = operation.name
            if name == "STOP":
                return self._stack.pop()
            if name not in ("PROTO", "FRAME"):
                self._do(name, argument)
        raise CheckpointError(f"{self._where}: damaged: it does not end")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = tuple(stack[len(stack) - count :])
            del stack[len(stack) - count :]
            stack.append(items)
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _PUT:
            self._memo[argument] = stack[-1]
        elif name in _GET:
            stack.append(self._memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        else:
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name == "APPEND":
            stack[-2].append(stack.pop())
        elif name == "APPENDS":
            items = self._since_mark()
            stack[-1].extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name == "SETITEMS":
            items = self._since_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(Record(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Record(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            args, kind = stack.pop(), stack.pop()
            stack.append(_made(kind, args))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Record) and isinstance(state, dict):
                stack[-1].state.update(state)
            elif isinstance(stack[-1], Record) and isinstance(state, tuple):
                stack[-1].args += state
        else:
            raise CheckpointError(f"{self._where}: has the operation {name}, which is not read")

    def _since_mark(self) -> list[Any]:
        stack, items = self._stack, []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]


def _made(kind: Any, args: Any) -> Any:
    """The record of an object; sizes of torch are tuples."""
    if not isinstance(kind, Record) or not isinstance(args, tuple):
        raise ValueError("an object without a class")
    if kind.name == "torch.Size":
        return tuple(args[0]) if args else ()
    return Record(kind.name, args)
