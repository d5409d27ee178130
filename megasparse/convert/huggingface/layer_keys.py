"""Keys of a `config.json` that differ from layer to layer, and those of the activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megasparse.config import ResolvedModel
from megasparse.config.layer_patterns import layers_of, pattern_of, window_text
from megasparse.config.validate_model import ACTIVATIONS
from megasparse.convert.huggingface.config_keys import Found, Reader

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Activation:
    """The FFN's activation without a gate, by Hugging Face's name.

    Attributes:
        theirs: the key.
        default: of a file that does not say it.
        names: their names; of each the setting, None for the GELU's tanh form. Of several names for
            one the first is written.
    """

    theirs: str
    default: str
    names: Mapping[str, str | None]

    def read(self, config: Reader, found: Found) -> None:
        config.require(self.theirs, tuple(self.names), self.default)
        setting = self.names[config.get(self.theirs, str, self.default)]
        if setting is not None:
            found[setting] = True

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        setting = next((name for name in ACTIVATIONS if getattr(model, name)), None)
        known = (name for name, value in self.names.items() if value == setting)
        # A family without it: what is read again is another model.
        return {self.theirs: next(known, self.default)}


@dataclass(frozen=True)
class Window:
    """A sliding window of every layer.

    Attributes:
        default: of a file that does not say it; null is none.
        switched: there is none unless `use_sliding_window` says so.
    """

    default: int | None
    switched: bool = False

    def read(self, config: Reader, found: Found) -> None:
        there = not self.switched or config.get("use_sliding_window", bool, False)
        found["window_size"] = _window(config, self.default) if there else None

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        switch = {"use_sliding_window": model.window is not None} if self.switched else {}
        return {**switch, "sliding_window": model.window}


@dataclass(frozen=True)
class WindowOfSome:
    """A sliding window of some layers.

    Attributes:
        default: its size in a file that does not say it.
        by: which layers have it where `layer_types` is not there: those from `max_window_layers`
            on, or those without rotary positions.
    """

    default: int | None
    by: Literal["max_window_layers", "no_rope"]

    def read(self, config: Reader, found: Found) -> None:
        layers: int = found["num_layers"]
        window = None
        if config.get("use_sliding_window", bool, False):
            window = _window(config, self.default)
        kinds = config.get("layer_types", list, self._kinds(config, found))
        if len(kinds) != layers or set(kinds) - {_SLIDING, _FULL}:
            raise config.wrong("layer_types", str(kinds), f"{layers} of {_SLIDING} or {_FULL}")
        windowed = [kind == _SLIDING for kind in kinds]
        if window is not None and any(windowed):
            found["window_size"] = window
            found["window_attn_skip_freq"] = pattern_of(windowed, nth=False)

    def _kinds(self, config: Reader, found: Found) -> list[str]:
        layers: int = found["num_layers"]
        if self.by == "no_rope":
            windowed = layers_of(found["no_rope_freq"], layers, nth=True)
        else:
            first = config.get("max_window_layers", int, 28)
            windowed = [number >= first for number in range(layers)]
        return _kinds_of(windowed)

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {
            "use_sliding_window": model.window is not None,
            "sliding_window": model.window,
            "layer_types": _kinds_of(model.windowed_layers),
        }


@dataclass(frozen=True)
class NoRope:
    """Layers without rotary positions: a list with 1 for those that rotate, or every N-th."""

    default: int = 4

    def read(self, config: Reader, found: Found) -> None:
        layers: int = found["num_layers"]
        every = config.size("no_rope_layer_interval", self.default)
        interval = [int((number + 1) % every != 0) for number in range(layers)]
        rotate = config.get("no_rope_layers", list, interval)
        if len(rotate) != layers or set(rotate) - {0, 1}:
            raise config.wrong("no_rope_layers", str(rotate), f"{layers} of 0 or 1")
        found["no_rope_freq"] = pattern_of([not one for one in rotate], nth=True)

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {"no_rope_layers": [int(not without) for without in model.layers_without_rope]}


def _window(config: Reader, default: int | None) -> str | None:
    """Hugging Face counts the token itself, Megatron those before it."""
    if not config.says("sliding_window"):
        size = default
    elif not config.has("sliding_window"):
        return None
    else:
        size = config.size("sliding_window")
    return None if size is None else window_text((size - 1, 0))


def _kinds_of(windowed: list[bool]) -> list[str]:
    return [_SLIDING if one else _FULL for one in windowed]
