"""What a row of a family's table says: one key of `config.json` and the setting that it is.

Every row reads in one direction and writes in the other. What a row cannot express in megasparse's
settings it refuses, naming the key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megasparse.config import ModelConfig, ResolvedModel
from megasparse.errors import CheckpointError

# Settings by name, of the rows read so far.
Found = dict[str, Any]
# A value that is there unless the file says another: fixed, or made of those found.
Default = Any | Callable[[Found], Any]


class Reader:
    """Typed access to a `config.json`.

    Args:
        config: its content.
        where: of the file, for messages.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self._config, self.where = config, where

    def says(self, name: str) -> bool:
        """Whether the key is there, if only as null."""
        return name in self._config

    def has(self, name: str) -> bool:
        """Whether the key is there and not null."""
        return self._config.get(name) is not None

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """A value of the type, or the default.

        Raises:
            CheckpointError: another type, or nothing and no default.
        """
        value = self._config.get(name)
        if value is None:
            value = default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            found = "nothing" if value is None else repr(value)
            raise self.wrong(name, found, kind.__name__)
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 on."""
        value: int = self.get(name, int, default)
        if value < 1:
            raise self.wrong(name, str(value), "at least 1")
        return value

    def require(self, name: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Refuse a model that computes something else."""
        value = self._config.get(name, default)
        if value not in allowed:
            raise self.wrong(name, repr(value), " or ".join(repr(one) for one in allowed))

    def wrong(self, name: str, found: str, expected: str) -> CheckpointError:
        """The error of a key."""
        return CheckpointError(f"{self.where}: {name}: found {found}, expected {expected}")


class Row(Protocol):
    """One line of a family's table."""

    def read(self, config: Reader, found: Found) -> None:
        """Add the settings to those found.

        Raises:
            CheckpointError: names the key.
        """
        ...

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        """The keys with their values."""
        ...


@dataclass(frozen=True)
class Size:
    """A whole number from 1 on; a model without a default must say it."""

    ours: str
    theirs: str
    default: Default = None

    def read(self, config: Reader, found: Found) -> None:
        found[self.ours] = config.size(self.theirs, _value(self.default, found))

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {self.theirs: getattr(model, self.ours)}


@dataclass(frozen=True)
class Number:
    """A number that need not be whole."""

    ours: str
    theirs: str
    default: float

    def read(self, config: Reader, found: Found) -> None:
        found[self.ours] = config.get(self.theirs, float, self.default)

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {self.theirs: getattr(model, self.ours)}


@dataclass(frozen=True)
class Switch:
    """A yes or no.

    Attributes:
        default: of the key.
        inverted: the setting is the key's opposite.
    """

    ours: str
    theirs: str
    default: bool
    inverted: bool = False

    def read(self, config: Reader, found: Found) -> None:
        value = config.get(self.theirs, bool, self.default)
        setting = value != self.inverted
        if found.setdefault(self.ours, setting) != setting:  # two keys for one setting
            raise config.wrong(self.theirs, repr(value), repr(not value))

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {self.theirs: getattr(model, self.ours) != self.inverted}


@dataclass(frozen=True)
class Must:
    """A key that may have these values alone; the first is written.

    Attributes:
        default: what a file that does not say it means.
        written: whether it is.
    """

    theirs: str
    allowed: tuple[Any, ...]
    default: Any
    written: bool = True

    def read(self, config: Reader, found: Found) -> None:
        config.require(self.theirs, self.allowed, self.default)

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {self.theirs: self.allowed[0]} if self.written else {}


@dataclass(frozen=True)
class Head:
    """Size of a head: a key, or the width over the heads where there is none.

    Attributes:
        theirs: the key; None: the family has none.
        hidden, heads: keys of the two, for messages.
    """

    theirs: str | None = "head_dim"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"

    def read(self, config: Reader, found: Found) -> None:
        if self.theirs is not None and config.has(self.theirs):
            found["kv_channels"] = config.size(self.theirs)
            return
        hidden, heads = found["hidden_size"], found["num_attention_heads"]
        if hidden % heads:
            raise CheckpointError(
                f"{config.where}: {self.hidden} {hidden} is not divisible by {self.heads} {heads}"
            )
        found["kv_channels"] = hidden // heads

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {} if self.theirs is None else {self.theirs: model.kv_channels}


@dataclass(frozen=True)
class Same:
    """A key that has to say what a setting says already, and does where it is not there."""

    ours: str
    theirs: str

    def read(self, config: Reader, found: Found) -> None:
        config.require(self.theirs, (found[self.ours], None), None)

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {self.theirs: getattr(model, self.ours)}


@dataclass(frozen=True)
class Always:
    """What every model of the family has, and `config.json` does not say."""

    settings: dict[str, Any]

    def read(self, config: Reader, found: Found) -> None:
        found.update({name: _value(value, found) for name, value in self.settings.items()})

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Written:
    """Keys that concern training alone: written, and not read."""

    keys: dict[str, Any]

    def read(self, config: Reader, found: Found) -> None: ...

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return dict(self.keys)


def default_of(setting: str) -> Any:
    """The default of one of our settings."""
    return getattr(ModelConfig, setting)


def _value(default: Default, found: Found) -> Any:
    return default(found) if callable(default) else default
