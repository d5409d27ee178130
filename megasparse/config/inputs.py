"""Where a run's inputs are: one source of data, and paths that mean the same from every folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from megasparse.config.fields import FieldInfo
from megasparse.config.schema import RunConfig
from megasparse.config.schema.training import DataConfig

# The ways to say where data come from; a run uses one of them.
DATA_SOURCES = (
    ("data_path",),
    ("train_data_path", "valid_data_path", "test_data_path"),
    ("mock_data",),
)


def replace_sources(config: RunConfig, given: dict[str, Any]) -> None:
    """Where data come from is one choice: a later source of settings replaces an earlier's.

    Args:
        given: what the later one sets of the group of the data.
    """
    chosen = {kind for kind in DATA_SOURCES if any(given.get(name) for name in kind)}
    if chosen:
        for name in (name for kind in DATA_SOURCES if kind not in chosen for name in kind):
            setattr(config.data, name, getattr(DataConfig(), name))


def locate(config: RunConfig, fields: Iterable[FieldInfo]) -> None:
    """Expand `~`, and make what is read absolute: the saved configuration names the same files
    from every folder."""
    for info in fields:
        kind = info.metadata.get("path")
        group = getattr(config, info.group)
        value = getattr(group, info.name)
        if not kind or not value:
            continue
        if isinstance(value, list):
            located = [word if is_number(word) else _located(word, kind) for word in value]
            setattr(group, info.name, located)
        else:
            setattr(group, info.name, _located(value, kind))


def _located(path: str, kind: str) -> str:
    expanded = os.path.expanduser(path)
    return os.path.abspath(expanded) if kind == "read" and expanded.strip() else expanded


def is_number(word: str) -> bool:
    """Whether a word of `--data-path` is a weight, not a path."""
    try:
        float(word)
    except ValueError:
        return False
    return True
