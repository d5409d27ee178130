"""Megatron-core's `torch_dist` checkpoints as a `Source`, without running anything that is in them.

    iter_0000100/  .metadata, *.distcp   tensors (`torch_dist_files.py`)
                   common.pt             Megatron's arguments, and the optimizer's settings
                   metadata.json         the format's name

Newer versions keep what was in `common.pt` as an object of the `.distcp` files. Layers are stacked
along a first dimension, or have their numbers in their names.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from megasparse.config.shapes import VOCABULARY, parameters
from megasparse.convert.huggingface.layout import parameter_shapes
from megasparse.convert.megatron.arguments import complete_model
from megasparse.convert.megatron.files import (
    arguments_of,
    iteration_folder,
    load_inert,
    load_weights,
)
from megasparse.convert.megatron.names import renamed
from megasparse.convert.megatron.torch_dist_files import (
    METADATA,
    Contents,
    DistTensor,
    read_metadata,
)
from megasparse.convert.megatron.torch_dist_optimizer import TorchDistOptimizer
from megasparse.convert.source import require_finite
from megasparse.errors import CheckpointError
from megasparse.input_files import refuse_links
from megasparse.tensor_files import Entry

COMMON, _COMMON_OBJECT = "common.pt", "common_state/shard_0_1"
_LAYERS = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
# What else a checkpoint holds beside weights.
_OTHERS = re.compile(r"(optimizer|chained_\d+|rng_state|rerun_state_machine_state|opt_param).*")


def is_torch_dist(path: Path) -> bool:
    """Whether a folder, or the iteration that it points to, has this format."""
    try:
        return (iteration_folder(path) / METADATA).is_file()
    except CheckpointError:
        return False


class TorchDistModel:
    """A `Source`; see there.

    Args:
        path: of an iteration, or of the folder that names it.
        dtype: weights are given in; None: as stored.
        vocab_size: before padding; None: what the arguments say, or all rows.
        optimizer_state: read that of the optimizer too, and give its float32 masters as weights.

    Attributes:
        optimizer: Adam's state, if it was asked for.

    Raises:
        CheckpointError: a file or tensor is missing, too many or damaged, or has another shape; or
            the optimizer's state is in a form that is not read.
        ConfigError: the model has something that megasparse cannot compute.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype | None = None,
        vocab_size: int | None = None,
        optimizer_state: bool = False,
    ) -> None:
        self._folder, self._dtype = iteration_folder(path), dtype
        refuse_links(self._folder, CheckpointError)
        self.where = str(self._folder)
        self.origin: dict[str, Any] = {"format": "torch_dist", "folder": str(path.absolute())}
        contents = read_metadata(self._folder)
        common = _common(self._folder, contents)
        arguments = arguments_of(common, self._folder / COMMON)
        stored = contents.tensors
        weights = {name: one for name, one in stored.items() if not _OTHERS.fullmatch(name)}
        self._tensors = _by_our_names(weights)
        words = self._tensors.get("embedding.word_embeddings.weight")
        if words is None:
            raise CheckpointError(f"{self.where}: holds no embedding.word_embeddings.weight")
        self._rows = words.shape[0]
        self.model = complete_model(arguments, self._rows, vocab_size, self.where)
        self._shapes = parameter_shapes(self.model)
        self._check()
        self.optimizer: TorchDistOptimizer | None = None
        if optimizer_state:
            wanted = {name: self._tensors[name] for name in self._shapes}
            self.optimizer = TorchDistOptimizer(common, stored, wanted, self._shapes, self.where)
            self._tensors |= self.optimizer.masters
            self.origin["optimizer"] = self.optimizer.settings

    def frozen_scales(self) -> dict[str, float]:
        return {}

    def entries(self) -> list[Entry]:
        return [
            Entry(name, self._dtype or self._tensors[name].dtype, shape)
            for name, shape in self._shapes.items()
        ]

    def read(self, name: str) -> torch.Tensor:
        whole = self._tensors[name].read()
        if name in VOCABULARY:
            whole = whole[: self.model.vocab_size].contiguous()
        require_finite(whole, f"{self.where}: {name}")
        return whole.to(self._dtype or whole.dtype)

    def _check(self) -> None:
        tied = not self.model.untie_embeddings_and_output_weights
        found = self._tensors.keys() - ({"output_layer.weight"} if tied else set())
        if missing := sorted(self._shapes.keys() - found):
            raise CheckpointError(f"{self.where}: holds no {missing[0]}")
        if unknown := sorted(found - self._shapes.keys()):
            raise CheckpointError(
                f"{self.where}: {len(unknown)} tensors that a GPT of its arguments does not have, "
                f"the first is {unknown[0]}"
            )
        for one in parameters(self.model, self._rows):
            tensor = self._tensors[one.name]
            tensor.check_dtype()
            if tensor.shape != one.shape:
                raise CheckpointError(
                    f"{self.where}: {one.name}: found shape {tensor.shape}, expected {one.shape}"
                )


def _common(folder: Path, contents: Contents) -> dict[str, Any]:
    """What is of no rank: arguments, and the optimizer's settings.

    Raises:
        CheckpointError: missing or damaged.
    """
    piece = contents.objects.get(_COMMON_OBJECT)
    if piece is None or (folder / COMMON).is_file():
        return load_weights(folder / COMMON)
    where = f"{piece.file}: {_COMMON_OBJECT}"
    match load_inert(piece.data(_COMMON_OBJECT), where):
        case [dict() as content]:
            return content
        case found:
            raise CheckpointError(f"{where}: found {type(found).__name__}, expected a dict in it")


def _by_our_names(tensors: dict[str, DistTensor]) -> dict[str, DistTensor]:
    """Each parameter's tensor; of stacked layers one for each layer."""
    found: dict[str, DistTensor] = {}
    for name, tensor in tensors.items():
        if match := _LAYERS.fullmatch(name):
            for layer in range(tensor.stacked[0]):
                one = dataclasses.replace(tensor, layer=layer)
                found[renamed(f"decoder.layers.{layer}.{match[1]}")] = one
        else:
            found[renamed(name)] = tensor
    return found
