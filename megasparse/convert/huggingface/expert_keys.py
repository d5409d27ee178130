"""Keys of a `config.json` that say which layers have experts, and how many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megasparse.config import ResolvedModel
from megasparse.config.layer_patterns import pattern_text
from megasparse.convert.huggingface.config_keys import Found, Reader

# Its name differs between families, and between releases of transformers.
NUMBERS = ("num_local_experts", "num_experts")


@dataclass(frozen=True)
class Experts:
    """How many experts a layer has.

    Attributes:
        theirs: the key that is written; either is read.
        default: of a file that does not say it.
    """

    theirs: str
    default: int

    def read(self, config: Reader, found: Found) -> None:
        key = next((name for name in NUMBERS if config.has(name)), self.theirs)
        found["num_experts"] = config.size(key, self.default)

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        return {self.theirs: model.num_experts}


@dataclass(frozen=True)
class ExpertLayers:
    """Which layers have experts: every n-th, but for those that are named (Qwen)."""

    step: str = "decoder_sparse_step"
    dense: str = "mlp_only_layers"

    def read(self, config: Reader, found: Found) -> None:
        step = config.size(self.step, 1)
        dense = config.get(self.dense, list, [])
        if any(type(number) is not int for number in dense):
            raise config.wrong(self.dense, repr(dense), "numbers of layers")
        layers = [
            int((number + 1) % step == 0 and number not in dense)
            for number in range(found["num_layers"])
        ]
        found["moe_layer_freq"] = "1" if all(layers) else pattern_text(layers)

    def write(self, model: ResolvedModel) -> dict[str, Any]:
        dense = [number for number, experts in enumerate(model.expert_layers) if not experts]
        return {self.step: 1, self.dense: dense}
