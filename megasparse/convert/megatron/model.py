"""A GPT or LLaMA checkpoint of Megatron-core or Megatron-DeepSpeed as a `Source`.

Shards are joined by the rules of tensor parallelism: what is split over output features along
dimension 0 (each of gate and up for itself), over input features along dimension 1. Stages number
their layers from 0; here they count on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from megasparse.config.shapes import VOCABULARY, parameters
from megasparse.convert.huggingface.layout import parameter_shapes
from megasparse.convert.megatron.arguments import complete_model
from megasparse.convert.megatron.files import MegatronFiles
from megasparse.convert.megatron.names import renamed
from megasparse.convert.source import require_finite
from megasparse.errors import CheckpointError
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import Entry

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IGNORED = re.compile(r".*(_extra_state.*|inv_freq|word_embeddings_for_head\..*)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class MegatronModel:
    """A `Source`; see there.

    Args:
        path: as `MegatronFiles` takes it.
        dtype: weights are given in; None: as stored.
        vocab_size: before padding; None: what the arguments say, or all rows.

    Raises:
        CheckpointError: a file or tensor is missing or too many, or has another shape.
        ConfigError: the model has something that megasparse cannot compute.
    """

    def __init__(
        self, path: Path, dtype: torch.dtype | None = None, vocab_size: int | None = None
    ) -> None:
        self._files, self._dtype = MegatronFiles(path), dtype
        self.where = str(self._files.folder)
        arguments = self._files.arguments()
        self.origin: dict[str, Any] = {
            "format": self._files.kind,
            "folder": str(self._files.folder.absolute()),
        }
        shards = [self._named(rank) for rank in range(self._files.tp)]
        self._shards = {name: [shard.get(name) for shard in shards] for name in shards[0]}
        self._padded = self._rows()
        self.model = complete_model(arguments, self._padded, vocab_size, self.where)
        self._shapes = parameter_shapes(self.model)
        self._in_files = {one.name: one for one in parameters(self.model, self._padded)}
        self._check()

    def frozen_scales(self) -> dict[str, float]:
        return {}

    def entries(self) -> list[Entry]:
        return [
            Entry(name, self._dtype or self._parts(name)[0].dtype, shape)
            for name, shape in self._shapes.items()
        ]

    def read(self, name: str) -> torch.Tensor:
        parts = self._parts(name)
        whole = torch.empty(self._in_files[name].shape, dtype=parts[0].dtype)
        for rank, part in enumerate(parts):
            self._shard(name, rank).write_into(whole, part)
        if name in VOCABULARY:
            whole = whole[: self.model.vocab_size].contiguous()
        require_finite(whole, f"{self.where}: {name}")
        return whole.to(self._dtype or whole.dtype)

    def _named(self, rank: int) -> dict[str, torch.Tensor]:
        """The tensors of a rank by megasparse's names."""
        named: dict[str, torch.Tensor] = {}
        pipeline_module = self._files.kind == "deepspeed-pipeline"
        first = 0
        for tensors in self._files.stages(rank):
            here = 0
            names = {_pipeline_name(key) if pipeline_module else key: key for key in tensors}
            for name, key in names.items():
                name = renamed(name)
                if _IGNORED.fullmatch(name):
                    continue
                if match := _LAYER.fullmatch(name):
                    here = max(here, int(match[1]) + 1)
                    name = f"decoder.layers.{first + int(match[1])}.{match[2]}"
                named.setdefault(name, tensors[key])  # of tied copies the first
            first += here
        return named

    def _rows(self) -> int:
        """Rows of the padded vocabulary."""
        parts = self._shards.get("embedding.word_embeddings.weight")
        if parts is None or any(part is None for part in parts):
            raise CheckpointError(f"{self.where}: holds no embedding.word_embeddings.weight")
        return sum(part.shape[0] for part in parts if part is not None)

    def _shard(self, name: str, rank: int) -> WeightShard:
        one = self._in_files[name]
        return WeightShard(one.shape, one.shard_dim, rank, self._files.tp, one.parts)

    def _parts(self, name: str) -> list[torch.Tensor]:
        """The shards of a parameter; of a replicated one the first."""
        parts = self._shards[name]
        if self._shard(name, 0).dim is None:
            parts = parts[:1]
        return [part for part in parts if part is not None]

    def _check(self) -> None:
        tied = not self.model.untie_embeddings_and_output_weights
        found = self._shards.keys() - ({"output_layer.weight"} if tied else set())
        if missing := sorted(self._shapes.keys() - found):
            raise CheckpointError(f"{self.where}: holds no {missing[0]}")
        if unknown := sorted(found - self._shapes.keys()):
            raise CheckpointError(
                f"{self.where}: {len(unknown)} tensors that a GPT of its arguments does not have, "
                f"the first is {unknown[0]}"
            )
        groups = self.model.num_query_groups
        if groups % self._files.tp:
            raise CheckpointError(
                f"{self.where}: {groups} query groups on {self._files.tp} tensor-parallel ranks"
            )
        for name in self._shapes:
            for rank, part in enumerate(self._shards[name]):
                shape = self._shard(name, rank).local_shape
                if part is None or tuple(part.shape) != shape or part.dtype not in _DTYPES:
                    what = "nothing" if part is None else f"{part.dtype} {tuple(part.shape)}"
                    raise CheckpointError(
                        f"{self.where}: {name} of tensor-parallel rank {rank}: found {what}, "
                        f"expected {shape}"
                    )


def _pipeline_name(key: str) -> str:
    """A name within a layer's file of a PipelineModule, as in a whole model."""
    if key in ("weight", "bias"):
        return f"decoder.final_layernorm.{key}"
    if key.startswith(("word_embeddings.", "position_embeddings.")):
        return f"embedding.{key}"
    return key if key.startswith("lm_head.") else f"decoder.layers.0.{key}"
