"""A model as a `torch_dist` checkpoint that Megatron-core loads: weights, no optimizer state.

    latest_checkpointed_iteration.txt   "release"
    release/                            as `torch_dist.py` describes it

torch's distributed checkpoints write the files; a piece is one parameter of one layer, read when it
is written, so that one is in memory at a time.
"""

from __future__ import annotations

import argparse
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megasparse.atomic_files import new_folder, synced, write_json, write_text
from megasparse.config.shapes import VOCABULARY
from megasparse.convert.megatron.arguments import megatron_arguments
from megasparse.convert.source import Source, pad_vocabulary, require_decoder
from megasparse.errors import StorageError
from megasparse.tensor_files import Entry

RELEASE = "release"
# Megatron's layers keep a norm beside the linear behind it; both of its layer specs read these.
_NAMES = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
# Modules whose FP8 state Megatron asks for; here it is nothing.
_WITH_STATE = (
    "self_attention.core_attention", "self_attention.linear_proj", "self_attention.linear_qkv",
    "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip


def write_torch_dist(source: Source, output: Path, multiple: int) -> None:
    """Write a model into a new or empty folder.

    Args:
        multiple: of the padded vocabulary.

    Raises:
        ConfigError: Megatron's layers do not compute the model.
        CheckpointError: a weight is damaged. StorageError: the output cannot be written.
    """
    require_decoder(source.model, source.where, "Megatron's checkpoints are written of decoders")
    rows = -(-source.model.vocab_size // multiple) * multiple
    arguments = megatron_arguments(source.model, rows)
    with new_folder(output, StorageError) as folder:
        inside = folder / RELEASE
        inside.mkdir()
        writer = FileSystemWriter(str(inside), single_file_per_rank=True, thread_count=1)
        with warnings.catch_warnings():  # that there are no ranks
            warnings.simplefilter("ignore")
            save({}, storage_writer=writer, planner=_Planner(source, rows), no_dist=True)
        with synced(inside / "common.pt") as stream:
            content = {
                "args": argparse.Namespace(**arguments),
                "checkpoint_version": 3.0,
                "iteration": 0,
            }
            torch.save(content, stream)
        versions = {"sharded_backend_version": 1, "common_backend_version": 1}
        backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        write_json(inside / "metadata.json", {**backends, **versions})
        write_text(folder / "latest_checkpointed_iteration.txt", RELEASE)


class _Planner(DefaultSavePlanner):
    """Every parameter as a piece of a tensor, or, of layers, of the stack of all layers."""

    def __init__(self, source: Source, rows: int) -> None:
        super().__init__(flatten_state_dict=False)
        self._source, self._rows = source, rows
        self._names: dict[MetadataIndex, str] = {}

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """There is no state dict: everything is read from the source."""

    def create_local_plan(self) -> SavePlan:
        """All pieces, and the modules' empty states."""
        items = [self._item(entry) for entry in self._source.entries()]
        layers = self._source.model.num_layers
        for number in range(layers):
            for module in _WITH_STATE:
                name = f"decoder.layers.{module}._extra_state/shard_{number}_{layers}"
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
        return SavePlan(items)

    def _item(self, entry: Entry) -> WriteItem:
        shape = entry.shape
        if entry.name in VOCABULARY:
            shape = (self._rows, *shape[1:])
        name, layer = _megatron_name(entry.name)
        whole, sizes, offsets = shape, shape, (0,) * len(shape)
        if layer is not None:
            layers = self._source.model.num_layers
            whole, sizes, offsets = (layers, *shape), (1, *shape), (layer, *offsets)
        index = MetadataIndex(name, torch.Size(offsets))
        self._names[index] = entry.name
        properties = TensorProperties(entry.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, properties, torch.Size(whole))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """What is written for a piece."""
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # of one module: nothing
            return nothing
        assert write_item.tensor_data is not None
        index = MetadataIndex(write_item.index.fqn, write_item.index.offset)
        name = self._names[index]
        value = pad_vocabulary(name, self._source.read(name), self._rows)
        return value.reshape(write_item.tensor_data.chunk.sizes)


def _megatron_name(name: str) -> tuple[str, int | None]:
    """Megatron's name of the stack of all layers, and the layer."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name, None
    number, within = name.removeprefix(prefix).split(".", 1)
    for ours, theirs in _NAMES:
        if within.startswith(ours):
            within = theirs + within.removeprefix(ours)
    return f"{prefix}{within}", int(number)
