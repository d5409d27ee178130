"""What a module takes where nobody says anything, and the numbers that it is built around.

A default that changes is another behaviour for whoever relied on it. Tests of each area have them
written out.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import megasparse

Found = dict[str, object]


def _is_number(value: object) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_number, value))
    return isinstance(value, (bool, int, float))


def _of_call(name: str, function: Any) -> Found:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {f"{name}({p.name})": p.default for p in parameters if _is_number(p.default)}


def _of_class(name: str, kind: type) -> Found:
    found = _of_call(name, kind.__init__)
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for key, value in vars(kind).items():
        if key.startswith("__") or key in fields or key == "_is_protocol":
            continue
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isfunction(value) and value.__module__ == kind.__module__:
            found |= _of_call(f"{name}.{key}", value)
        elif _is_number(value):
            found[f"{name}.{key}"] = value
    return found


def _assigned(module: Any) -> set[str]:
    tree = ast.parse(Path(module.__file__).read_text())
    targets = [t for one in tree.body if isinstance(one, ast.Assign) for t in one.targets]
    names = [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return {one.id for one in names if isinstance(one, ast.Name)}


def defaults_of(module: Any) -> Found:
    """Numbers and switches by `function(parameter)`, `Class(parameter)`,
    `Class.method(parameter)`, `Class.attribute` or `CONSTANT`."""
    found: Found = {}
    for name in _assigned(module):
        if _is_number(value := getattr(module, name)):
            found[name] = value
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            found |= _of_class(name, value)
        elif callable(value) and inspect.isfunction(inspect.unwrap(value)):
            found |= _of_call(name, value)
    return found


def modules_of(area: str) -> list[str]:
    """Names of an area's modules, below `megasparse`."""
    root = Path(megasparse.__file__ or "").parent
    paths = sorted((root / area).rglob("*.py"))
    names = (".".join(p.relative_to(root).with_suffix("").parts) for p in paths)
    return [name.removesuffix(".__init__") for name in names]


def check(area: str, written: dict[str, Found]) -> None:
    """All defaults of an area are as written; a switch that is not written is off."""
    names = modules_of(area)
    assert set(written) <= set(names)
    for name in names:
        found = defaults_of(importlib.import_module(f"megasparse.{name}"))
        told = {key: value for key, value in found.items() if value is not False}
        wanted = written.get(name, {})
        assert {k: repr(v) for k, v in told.items()} == {k: repr(v) for k, v in wanted.items()}, (
            name
        )
