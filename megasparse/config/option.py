"""What a field of the run configuration is made with."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its help text and limits (`choices`, `at_least`, `above`, `below`)."""
    metadata = {"help": help, **limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
