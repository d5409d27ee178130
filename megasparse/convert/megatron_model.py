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

from megasparse.config import CompleteModel, ModelConfig, narrowed
from megasparse.config.shapes import VOCABULARY, parameters
from megasparse.convert.layout import parameter_shapes
from megasparse.convert.megatron_files import MegatronFiles
from megasparse.convert.source import require_finite
from megasparse.errors import CheckpointError, ConfigError
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import Entry

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Longest first; from Megatron's names, old and new, to megatron-core's with separate norms.
_RENAMED = (
    (r"^module\.", ""),
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"\.linear_qkv\.layer_norm_", ".@input_layernorm."),
    (r"\.linear_fc1\.layer_norm_", ".@pre_mlp_layernorm."),
    (r"\.(self_attention|mlp)\.@", "."),
    (r"\.attention\.", ".self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.post_attention_layernorm\.", ".pre_mlp_layernorm."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    (r"^lm_head\.", "output_layer."),
)
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
        model = megatron_config(arguments, self.where)
        self._padded = self._rows()
        stated = arguments.get("vocab_size")
        known = stated if isinstance(stated, int) and 0 < stated <= self._padded else self._padded
        model.vocab_size = vocab_size or known
        self.model = narrowed(CompleteModel, model, self.where)
        if self.model.vocab_size > self._padded:
            raise ConfigError(
                f"vocab_size {vocab_size} is more than the {self._padded} rows of {self.where}"
            )
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
                for pattern, new in _RENAMED:
                    name = re.sub(pattern, new, name)
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


def megatron_config(arguments: dict[str, Any], where: str) -> ModelConfig:
    """The model that Megatron's arguments describe, but the vocabulary.

    Raises:
        CheckpointError: a size is missing. ConfigError: megasparse cannot compute it.
    """

    def size(*names: str) -> int:
        for name in names:
            value = arguments.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        raise CheckpointError(f"{where}: args: found no {names[0]}")

    def flag(name: str, default: bool = False) -> bool:
        return bool(arguments.get(name, default))

    _refuse_what_is_missing(arguments, where)
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    groups = arguments.get("num_key_value_heads") or heads
    if flag("group_query_attention"):
        groups = size("num_query_groups")
    positions = arguments.get("position_embedding_type", "learned_absolute")
    if flag("use_rotary_position_embeddings"):
        positions = "rope"
    normalization = str(arguments.get("normalization", "LayerNorm")).lower()
    bias = not flag("disable_bias_linear")
    return ModelConfig(
        num_layers=size("num_layers"),
        hidden_size=hidden,
        ffn_hidden_size=size("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        group_query_attention=groups != heads,
        kv_channels=arguments.get("kv_channels") or hidden // heads,
        seq_length=size("seq_length", "max_position_embeddings"),
        max_position_embeddings=size("max_position_embeddings"),
        position_embedding_type=str(positions),
        rotary_base=int(arguments.get("rotary_base") or arguments.get("rope_theta") or 10000),
        rotary_percent=float(arguments.get("rotary_percent", 1.0)),
        use_rope_scaling=flag("use_rope_scaling"),
        rope_scaling_factor=float(arguments.get("rope_scaling_factor", 8.0)),
        normalization="RMSNorm" if normalization == "rmsnorm" else "LayerNorm",
        norm_epsilon=float(
            arguments.get("norm_epsilon") or arguments.get("layernorm_epsilon") or 1e-5
        ),
        swiglu=flag("swiglu"),
        squared_relu=flag("squared_relu"),
        disable_bias_linear=not flag("add_bias_linear", bias),
        untie_embeddings_and_output_weights=flag("untie_embeddings_and_output_weights"),
    )


def _refuse_what_is_missing(arguments: dict[str, Any], where: str) -> None:
    """Settings with another function than megasparse's layers, under which no tensor is missing."""
    positions = arguments.get("position_embedding_type", "learned_absolute")
    wrong = {
        "quick_geglu": bool(arguments.get("quick_geglu")),  # another GELU than --geglu's
        "apply_layernorm_1p": bool(arguments.get("apply_layernorm_1p")),
        "rotary_interleaved": bool(arguments.get("rotary_interleaved")),
        "rotary_seq_len_interpolation_factor": bool(
            arguments.get("rotary_seq_len_interpolation_factor")
        ),
        "position_embedding_type": positions not in ("learned_absolute", "rope"),
        # Without its fusion Megatron's GELU is the exact one, here it is the tanh form.
        "bias_gelu_fusion": not arguments.get("swiglu")
        and not arguments.get("squared_relu")
        and not arguments.get("openai_gelu")
        and arguments.get("bias_gelu_fusion") is False,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(
                f"{where}: args: {name} {arguments.get(name)!r} is not what megasparse computes"
            )


def _pipeline_name(key: str) -> str:
    """A name within a layer's file of a PipelineModule, as in a whole model."""
    if key in ("weight", "bias"):
        return f"decoder.final_layernorm.{key}"
    if key.startswith(("word_embeddings.", "position_embeddings.")):
        return f"embedding.{key}"
    return key if key.startswith("lm_head.") else f"decoder.layers.0.{key}"
