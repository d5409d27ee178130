"""Counting the files that a process opens of those that hosts share."""

from __future__ import annotations

import sys
from typing import Any, Protocol


class Counter(Protocol):
    """Who counts: `opened` is raised."""

    opened: int


class CountedOpens:
    """Counts files of the checkpoint that are opened, by this process's own audit hook."""

    current: Counter | None = None

    def __init__(self, rank: Counter) -> None:
        self._rank = rank

    def __enter__(self) -> None:
        CountedOpens.current = self._rank
        # The reader before mapped files in native code, which no hook sees.
        reader = sys.modules["megasparse.checkpoint.reader"]
        mapped = getattr(reader, "safe_open", None)
        if mapped is not None and not hasattr(mapped, "counted"):

            def counted(path: Any, **named: Any) -> Any:
                note("open", (str(path),))
                return mapped(path, **named)

            counted.counted = True  # type: ignore[attr-defined]
            reader.safe_open = counted  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        CountedOpens.current = None


def note(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: count an open file, if it is one that hosts share."""
    rank = CountedOpens.current
    if event == "open" and rank is not None:
        name = str(arguments[0])
        rank.opened += name.endswith(".safetensors") or ".attempt.json" in name
