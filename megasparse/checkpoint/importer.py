"""A model from elsewhere as a checkpoint of step 0: parameters, and Adam's state if it has one."""

from __future__ import annotations

import dataclasses
import math
import secrets
from pathlib import Path
from typing import Any

import torch

import megasparse
from megasparse.atomic_files import check_free_space, new_folder, replacing, write_text
from megasparse.checkpoint.directory import step_folder, write_pointer
from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.writer import Tensors, publish, write_rank_file
from megasparse.config import RunConfig, dump_yaml, to_dict
from megasparse.config.shapes import VOCABULARY
from megasparse.convert.optimizer_state import MOMENTS, OptimizerState
from megasparse.convert.source import Source, pad_vocabulary
from megasparse.errors import StorageError
from megasparse.input_files import read_regular
from megasparse.progress import progress
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import Entry

# Files of the model that it came from, beside the checkpoint.
CARRIED_FOLDER = "huggingface"


def write_imported(
    source: Source,
    output: Path,
    max_shard_bytes: int,
    vocabulary_multiple: int,
    carried: list[Path],
    bar: bool = False,
    optimizer: OptimizerState | None = None,
) -> Path:
    """Write a source as a checkpoint of step 0; memory for a few tensors.

    Args:
        output: a new or empty folder; gets the checkpoint, `config.yaml` with the model's settings
            and a folder with the carried files.
        max_shard_bytes: of a file of the checkpoint.
        vocabulary_multiple: the vocabulary is padded to a multiple of this.
        carried: config.json, tokenizer.
        bar: show a progress bar.
        optimizer: of the source's weights, which are its masters then; a run goes on with it.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the source is damaged. StorageError: the output is not empty, or cannot be
            written.
    """
    config = RunConfig(model=source.model)
    config.model.make_vocab_size_divisible_by = vocabulary_multiple
    rows = -(-source.model.vocab_size // vocabulary_multiple) * vocabulary_multiple
    weights = [_padded(entry, rows) for entry in source.entries()]
    config.train.bf16 = all(entry.dtype == torch.bfloat16 for entry in weights)
    entries = [dataclasses.replace(entry, name=f"param/{entry.name}") for entry in weights]
    if optimizer is not None:
        entries += [
            Entry(f"optim/{entry.name}/{kind}", torch.float32, entry.shape)
            for entry in weights
            for kind in MOMENTS
        ]
    binding = {"run_id": secrets.token_hex(8), "step": 0}
    total = sum(entry.nbytes for entry in entries)
    with new_folder(output, StorageError) as folder:
        check_free_space(folder, total + (1 << 20), StorageError)
        for path in carried:
            with replacing(folder / CARRIED_FOLDER / path.name) as stream:
                stream.write(read_regular(path))
        temporary = folder / "step-00000000.tmp-0"
        temporary.mkdir(mode=0o700)
        files: dict[str, dict[str, Any]] = {}
        with progress(desc="converting", total=total, unit="B", enabled=bar) as shown:

            def read(key: str) -> torch.Tensor:
                kind, name, *moment = key.split("/")
                if kind == "param":
                    value = source.read(name)
                else:
                    assert optimizer is not None
                    value = optimizer.read(name, *moment)
                value = pad_vocabulary(name, value, rows)
                shown.update(value.numel() * value.element_size())
                return value

            for rank, shard in enumerate(_divide(entries, max_shard_bytes)):
                files |= write_rank_file(temporary, rank, shard, binding, read=read)
        steps = 0 if optimizer is None else optimizer.steps
        meta = _describe(source, config, binding, steps)
        publish(temporary, step_folder(folder, 0), files, meta)
        write_pointer(folder, 0)
        write_text(folder / "config.yaml", dump_yaml(config, groups=("model",)))
    return step_folder(output, 0)


def _padded(entry: Entry, rows: int) -> Entry:
    if entry.name not in VOCABULARY:
        return entry
    return Entry(entry.name, entry.dtype, (rows, *entry.shape[1:]))


def _divide(entries: list[Entry], limit: int) -> list[Tensors]:
    """The pieces of each file, with empty tensors for their values."""
    shards: list[Tensors] = []
    size = math.inf
    for entry in entries:
        if size + entry.nbytes > limit:
            shards.append({})
            size = 0
        piece = Piece(entry.name, WeightShard(entry.shape))
        shards[-1][entry.name] = (piece, torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        size += entry.nbytes
    return shards


def _describe(
    source: Source, config: RunConfig, binding: dict[str, Any], optimizer_steps: int
) -> dict[str, Any]:
    return {
        **binding,
        "consumed_samples": 0,
        "layout": {"world": 1, "tp": 1, "dp": 1, "pp": 1, "zero": 0},
        "optimizer_steps": optimizer_steps,
        "digests": {},
        "config": to_dict(config),
        "state": {
            "flip_history": [],
            "refreshes": 0,
            "skipped_steps": 0,
            "pending_row": None,
            "vocab_size": source.model.vocab_size,
            "scales": source.frozen_scales(),
            "imported": source.origin,
        },
        "versions": {"megasparse": megasparse.__version__, "torch": torch.__version__},
    }
