"""Weights from elsewhere as the start of a run.

They come from an imported checkpoint (`--load`) or straight from a Hugging Face folder
(`--load-hf`). The run starts at step 0 with a fresh optimizer; its model must be the same, all
other settings are its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megasparse.config import RunConfig
from megasparse.convert.huggingface import HuggingFaceModel
from megasparse.convert.source import VOCABULARY, Source, check_model, pad_vocabulary
from megasparse.errors import CheckpointError
from megasparse.megatron.init import parameter_shard
from megasparse.sparsity.shard import WeightShard
from megasparse.train.engine import Engine
from megasparse.train.storage import CheckpointReader
from megasparse.train.stored import StoredModel


def foreign_weights(
    config: RunConfig, reader: CheckpointReader | None, vocab_size: int
) -> Source | None:
    """The weights from elsewhere that a run starts from, of the same model; None if there are none.

    Args:
        config: resolved.
        reader: of the checkpoint that the run found; one with a run's state goes before `load_hf`.
        vocab_size: of the run, before padding.

    Raises:
        ConfigError: of another model; names the field with both values. CheckpointError: damaged.
    """
    source: Source
    if reader is not None:
        if not reader.imported:
            return None
        source = StoredModel(reader)
    elif config.checkpoint.load_hf is not None:
        source = HuggingFaceModel(Path(config.checkpoint.load_hf))
    else:
        return None
    check_model(source, config.model, vocab_size)
    return source


def start_from(engine: Engine, source: Source, rows: int) -> None:
    """Put weights into a model and its optimizer's float32 masters, at step 0.

    Args:
        rows: of the padded vocabulary.

    Raises:
        CheckpointError: another shape than the model's.
    """
    grid = engine.grid
    fragments: dict[str, list[Any]] = {}
    for fragment in engine.fragments:
        fragments.setdefault(fragment.name, []).append(fragment)
    for name, parameter in engine.model.named_parameters():
        whole = pad_vocabulary(name, source.read(name), rows)
        shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
        check_shape(whole, shard, name, source.where)
        local = shard.take(whole)
        with torch.no_grad():
            with engine.whole([parameter], write=True):
                parameter.copy_(local)
            for fragment in fragments.get(name, []):
                if fragment.tensor is not fragment.parameter:
                    part = fragment.of_parameter(local)
                    fragment.of(fragment.tensor.data).copy_(part.to(fragment.tensor.dtype))
    for state, _ in engine.controller.weights:
        state.invalidate()


def check_shape(whole: torch.Tensor, shard: WeightShard, name: str, where: str) -> None:
    """Refuse a tensor of another size than the model's parameter.

    Raises:
        CheckpointError: names both shapes.
    """
    if tuple(whole.shape) == shard.global_shape:
        return
    hint = " (--make-vocab-size-divisible-by)" if name in VOCABULARY else ""
    raise CheckpointError(
        f"{where}: {name} has shape {tuple(whole.shape)}, the model expects "
        f"{shard.global_shape}{hint}"
    )
