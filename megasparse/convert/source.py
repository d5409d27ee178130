"""What can be converted: a model whose parameters are read one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from megasparse.config import CompleteModel, ResolvedModel
from megasparse.config.shapes import VOCABULARY
from megasparse.convert.huggingface.architecture import differences
from megasparse.errors import CheckpointError, ConfigError
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import Entry

_CHUNK = 1 << 22


class Source(Protocol):
    """A model that is somewhere on disk.

    Attributes:
        model: its sizes and style.
        where: of the model, for messages.
        origin: what it is, for the record; JSON.
    """

    model: CompleteModel
    where: str
    origin: dict[str, Any]

    def entries(self) -> list[Entry]:
        """All parameters by megasparse's names, in order; the vocabulary without padding."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One parameter, whole, on the CPU.

        Raises:
            CheckpointError: damaged, or with a NaN or an infinity; names file and tensor.
        """
        ...

    def frozen_scales(self) -> dict[str, float]:
        """S-STE's beta of each weight that `read` gives without it and that was trained with a
        frozen one, by the weight's name: float32 values."""
        ...


class PartSource(Source, Protocol):
    """A source whose parameters a rank of a tensor-parallel model can read in part."""

    def read_part(self, name: str, shard: WeightShard) -> torch.Tensor:
        """A rank's part of a parameter, on the CPU; rows that pad the vocabulary are zero.

        Args:
            shard: of the parameter in the model, whose vocabulary is padded.

        Returns:
            Of the shard's local shape.

        Raises:
            CheckpointError: as `read`, or of another shape than the model's.
        """
        ...


def require_decoder(model: ResolvedModel, where: str, what: str) -> None:
    """Refuse a BERT.

    Args:
        what: is of decoders alone.

    Raises:
        ConfigError: names the model.
    """
    if model.is_bert:
        raise ConfigError(f"{where}: model_type is bert, {what}: expected gpt")


def part_of_whole(source: Source, name: str, shard: WeightShard) -> torch.Tensor:
    """What `read_part` gives, where a parameter can only be read whole."""
    value = pad_vocabulary(name, source.read(name), shard.global_shape[0])
    check_shape(value.shape, shard, name, source.where)
    return shard.slice_of(value)


def check_shape(found: Sequence[int], shard: WeightShard, name: str, where: str) -> None:
    """Refuse a tensor of another shape than the model's parameter.

    Raises:
        CheckpointError: names both shapes.
    """
    if tuple(found) == shard.global_shape:
        return
    hint = " (--make-vocab-size-divisible-by)" if name in VOCABULARY else ""
    raise CheckpointError(
        f"{where}: {name} has shape {tuple(found)}, the model expects {shard.global_shape}{hint}"
    )


def require_finite(tensor: torch.Tensor, where: str) -> None:
    """Refuse weights that no run can start from.

    Raises:
        CheckpointError: names the tensor and how many values are not finite.
    """
    # In pieces: the intermediate results of a whole embedding are larger than itself.
    pieces = tensor.reshape(-1).split(_CHUNK)
    bad = sum(piece.numel() - int(torch.isfinite(piece).sum()) for piece in pieces)
    if bad:
        raise CheckpointError(
            f"{where}: found {bad} values that are NaN or infinite of {tensor.numel()}, "
            "expected finite weights"
        )


def check_model(source: Source, model: ResolvedModel, vocab_size: int) -> None:
    """Refuse to put the source's weights into another model.

    Args:
        model: of the run.
        vocab_size: of the run, before padding.

    Raises:
        ConfigError: names the field with both values.
    """
    found = source.model
    for name in differences(found, model):
        raise ConfigError(
            f"{source.where} has {name} {getattr(found, name)!r}, this run has "
            f"{getattr(model, name)!r}"
        )
    if found.vocab_size != vocab_size:
        raise ConfigError(
            f"{source.where} has vocab_size {found.vocab_size}, this run has {vocab_size} "
            "(--vocab-size, or that of its tokenizer)"
        )


def pad_vocabulary(name: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A parameter with zero rows for the tokens that pad the vocabulary, if it has tokens."""
    if name not in VOCABULARY or tensor.shape[0] == rows:
        return tensor
    padding = tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])
    return torch.cat([tensor, padding])
