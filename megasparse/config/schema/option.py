"""A field of the configuration: its default, its help text and its limits."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its help text and limits.

    Args:
        limits: `choices`, `at_least`, `above`, `below`; `joined`: between the items of a list in
            YAML, which are one text; `empty`: a text may be empty; `path`: it names files that are
            "read" or "written"; `canonical`: makes of every spelling of a value the one text, or
            raises ValueError; `form`: what such a value looks like.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
