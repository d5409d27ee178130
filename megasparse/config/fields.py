"""The fields of the configuration as data: name, type, limits, and a value read as one of them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterator
from typing import Any

from megasparse.config.schema import RunConfig
from megasparse.errors import ConfigError
from megasparse.input_files import shown

# Other spellings that Megatron-DeepSpeed and Megatron users type.
ALIASES = {"num_key_value_heads": "num_query_groups"}


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """One field: where it lives, its plain type, and its limits."""

    group: str
    name: str
    kind: type  # int, float, bool, str, or list (of str)
    optional: bool
    metadata: dict[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def fields() -> Iterator[FieldInfo]:
    """All fields of all groups, in order."""
    for group in dataclasses.fields(RunConfig):
        section = typing.cast(Any, group.default_factory)
        hints = typing.get_type_hints(section)
        for item in dataclasses.fields(section):
            hint, optional = hints[item.name], False
            if typing.get_origin(hint) in (typing.Union, types.UnionType):
                (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
                optional = True
            kind = typing.get_origin(hint) or hint
            yield FieldInfo(group.name, item.name, kind, optional, dict(item.metadata))


# Beyond it a number is not exact as a float, and no size of a run.
MAX_INTEGER = 1 << 53

FIELDS = {info.name: info for info in fields()}


def nearest_field(name: str) -> str:
    """`, did you mean NAME?` of the field that is spelt most like a name, or nothing."""
    matches = difflib.get_close_matches(name, [*FIELDS, *ALIASES], n=1, cutoff=0.6)
    return f", did you mean {matches[0]}?" if matches else ""


def convert(info: FieldInfo, value: Any, source: str) -> Any:
    """`value` (a YAML scalar or a flag's text) as the field's type, within its limits.

    Raises:
        ConfigError: it is not; names `source`, what was found and what is expected.
    """
    if value is None or (info.optional and value in ("none", "None", ["none"])):
        if info.optional:
            return None
        raise ConfigError(f"{source}: found no value, expected {info.kind.__name__}")
    wrong = ConfigError(f"{source}: found {shown(value)}, expected {expected(info)}")
    if "canonical" in info.metadata:
        try:
            return info.metadata["canonical"](value)
        except ValueError:
            raise wrong from None
    if info.kind is list:
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (dict, list)) or item is None for item in items):
            raise wrong
        texts = [str(item) for item in items]
        if any(not is_text(text, info.metadata.get("empty")) for text in texts):
            raise wrong
        return texts
    if info.kind is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, list) and "joined" in info.metadata:
        if any(isinstance(item, (bool, dict, list)) or item is None for item in value):
            raise wrong
        value = info.metadata["joined"].join(str(item) for item in value)
    if isinstance(value, (bool, dict, list)):
        raise wrong
    try:
        if info.kind is int and isinstance(value, float) and not value.is_integer():
            raise wrong
        converted = info.kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    limits = info.metadata
    if (
        (isinstance(converted, float) and not math.isfinite(converted))
        or (isinstance(converted, int) and abs(converted) > MAX_INTEGER)
        or (isinstance(converted, str) and not is_text(converted, info.metadata.get("empty")))
        or ("choices" in limits and converted not in limits["choices"])
        or ("at_least" in limits and converted < limits["at_least"])
        or ("above" in limits and converted <= limits["above"])
        or ("below" in limits and converted >= limits["below"])
    ):
        raise wrong
    return converted


def is_text(text: str, may_be_empty: bool | None = False) -> bool:
    """Whether the system can take a text as a name: an empty one is an unset shell variable."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # halves of surrogate pairs, which YAML can name
        return False
    return (bool(text.strip()) or bool(may_be_empty)) and "\0" not in text and len(text) < 4096


def expected(info: FieldInfo) -> str:
    """What a value of the field has to be, in words."""
    limits = info.metadata
    if "form" in limits:
        return str(limits["form"])
    if "choices" in limits:
        return "one of " + ", ".join(str(choice) for choice in limits["choices"])
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
    }
    bounds = [
        f"{words} {limits[key]}"
        for key, words in (("at_least", "at least"), ("above", "above"), ("below", "below"))
        if key in limits
    ]
    return " ".join([names.get(info.kind, "a list of texts"), " and ".join(bounds)]).strip()
