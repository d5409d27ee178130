"""Rotary positions in a `config.json`: version 5's `rope_parameters`, and the keys before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megasparse.config import ResolvedModel
from megasparse.convert.huggingface.config_keys import Found, Reader, default_of
from megasparse.errors import CheckpointError

# megatron-core's rotary scaling has these built in; they are those of Llama 3.1 to 3.3.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Rope:
    """Base, Llama 3's scaling, and the share of a head that rotates.

    Keys that are not there are what transformers takes for them, or missing there too.

    Attributes:
        theta: the base of a model that does not say it.
        theta_key: of the base before version 5.
        percent: the share of a head that rotates in a model that does not say it; None: the family
            rotates whole heads.
        percent_key: of the share before version 5.
    """

    theta: float = 10000.0
    theta_key: str = "rope_theta"
    percent: float | None = None
    percent_key: str = "partial_rotary_factor"

    def read(self, config: Reader, found: Found) -> None:
        new = config.get("rope_parameters", dict, {})
        old = config.get("rope_scaling", dict, {})
        scaling = Reader({**old, **new}, f"{config.where}: rope")
        theta = config.get(self.theta_key, float, self.theta)
        base = scaling.get("rope_theta", float, theta)
        if base != int(base):
            raise config.wrong(self.theta_key, str(base), "a whole number")
        found["position_embedding_type"] = "rope"
        found["rotary_base"] = int(base)
        found["rotary_percent"] = self._percent(config, scaling)
        self._read_scaling(config, scaling, found, old | new)

    def _percent(self, config: Reader, scaling: Reader) -> float:
        if self.percent is None:
            config.require("partial_rotary_factor", (1.0, None), None)
            scaling.require("partial_rotary_factor", (1.0, None), None)
            return 1.0
        old = config.get(self.percent_key, float, self.percent)
        percent: float = scaling.get("partial_rotary_factor", float, old)
        if not 0.0 < percent <= 1.0:
            raise scaling.wrong("partial_rotary_factor", str(percent), "above 0 and at most 1")
        return percent

    def _read_scaling(
        self, config: Reader, scaling: Reader, found: Found, keys: dict[str, Any]
    ) -> None:
        kind = keys.get("rope_type", keys.get("type", "default"))
        found["use_rope_scaling"] = kind != "default"
        found["rope_scaling_factor"] = default_of("rope_scaling_factor")
        if kind == "default":
            return
        scaling.require("rope_type", ("llama3",), kind)
        found["rope_scaling_factor"] = scaling.get("factor", float)
        trained = config.get("original_max_position_embeddings", int, 0)
        positions = found["max_position_embeddings"]
        trained = trained or scaling.get("original_max_position_embeddings", int, positions)
        values = {"original_max_position_embeddings": trained}
        values |= {
            name: scaling.get(name, float) for name in ("low_freq_factor", "high_freq_factor")
        }
        for name, value in _LLAMA3.items():
            if values[name] != value:
                raise CheckpointError(
                    f"{scaling.where}: {name}: found {values[name]!r}, expected {value!r}"
                )

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
        if model.use_rope_scaling:
            rope.update(rope_type="llama3", factor=model.rope_scaling_factor, **_LLAMA3)
        before: dict[str, Any] = {  # transformers before version 5
            self.theta_key: float(model.rotary_base),
            "rope_scaling": rope if model.use_rope_scaling else None,
        }
        if self.percent is not None:
            rope["partial_rotary_factor"] = model.rotary_percent
            before[self.percent_key] = model.rotary_percent
        return {"rope_parameters": rope, **before}
