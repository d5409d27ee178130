"""Megatron-core's `torch_dist` checkpoints as a `Source`, without running anything that is in them.

    iter_0000100/  .metadata      every tensor's shape and type, and where its pieces are: a pickle
                   __0_0.distcp   pieces one after the other, each as `torch.save` writes it
                   common.pt      Megatron's arguments
                   metadata.json  the format's name

Tensors are whole there, whatever the layout of the writer. Layers are stacked along a first
dimension, or have their numbers in their names. Optimizer state is left where it is.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.config.shapes import VOCABULARY, parameters
from megasparse.convert.huggingface.layout import parameter_shapes
from megasparse.convert.megatron import inert_pickle
from megasparse.convert.megatron.arguments import complete_model
from megasparse.convert.megatron.files import arguments_of, iteration_folder, load_weights
from megasparse.convert.megatron.inert_pickle import Record
from megasparse.convert.megatron.names import renamed
from megasparse.convert.source import require_finite
from megasparse.errors import CheckpointError
from megasparse.input_files import open_regular, read_regular, refuse_links
from megasparse.tensor_files import Entry

METADATA, COMMON = ".metadata", "common.pt"
_MAX_METADATA_BYTES = 1 << 31
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_LAYERS = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
# What else a checkpoint holds beside weights.
_OTHERS = re.compile(r"(optimizer|chained_\d+|rng_state|rerun_state_machine_state|opt_param).*")


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor: where it begins, its shape, and its place in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class _Tensor:
    """A whole tensor of the checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]


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

    Raises:
        CheckpointError: a file or tensor is missing, too many or damaged, or has another shape.
        ConfigError: the model has something that megasparse cannot compute.
    """

    def __init__(
        self, path: Path, dtype: torch.dtype | None = None, vocab_size: int | None = None
    ) -> None:
        self._folder, self._dtype = iteration_folder(path), dtype
        refuse_links(self._folder, CheckpointError)
        self.where = str(self._folder)
        self.origin: dict[str, Any] = {"format": "torch_dist", "folder": str(path.absolute())}
        arguments = arguments_of(load_weights(self._folder / COMMON), self._folder / COMMON)
        self._tensors = _by_our_names(_tensors(self._folder))
        words = self._tensors.get("embedding.word_embeddings.weight")
        if words is None:
            raise CheckpointError(f"{self.where}: holds no embedding.word_embeddings.weight")
        self._rows = words[0].shape[0]
        self.model = complete_model(arguments, self._rows, vocab_size, self.where)
        self._shapes = parameter_shapes(self.model)
        self._check()

    def frozen_scales(self) -> dict[str, float]:
        return {}

    def entries(self) -> list[Entry]:
        return [
            Entry(name, self._dtype or self._tensors[name][0].dtype, shape)
            for name, shape in self._shapes.items()
        ]

    def read(self, name: str) -> torch.Tensor:
        tensor, layer = self._tensors[name]
        whole = torch.empty(tensor.shape[layer is not None :], dtype=tensor.dtype)
        filled = 0
        for piece in tensor.pieces:
            if layer is not None and not (
                piece.offsets[0] <= layer < piece.offsets[0] + piece.sizes[0]
            ):
                continue
            value = self._value(piece, tensor.dtype, name)
            offsets = piece.offsets
            if layer is not None:
                value, offsets = value[layer - offsets[0]], offsets[1:]
            place = tuple(slice(o, o + n) for o, n in zip(offsets, value.shape, strict=True))
            whole[place] = value
            filled += value.numel()
        if filled != whole.numel():
            raise CheckpointError(
                f"{self.where}: {name}: pieces of {filled} values, expected {whole.numel()}"
            )
        if name in VOCABULARY:
            whole = whole[: self.model.vocab_size].contiguous()
        require_finite(whole, f"{self.where}: {name}")
        return whole.to(self._dtype or whole.dtype)

    def _value(self, piece: _Piece, dtype: torch.dtype, name: str) -> torch.Tensor:
        try:
            with open_regular(piece.file) as stream:
                stream.seek(piece.start)
                data = stream.read(piece.length)
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # zip files and pickles raise of everything
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{piece.file}: {name}: cannot be read: {reason}") from None
        if not isinstance(value, torch.Tensor) or value.dtype != dtype:
            raise CheckpointError(f"{piece.file}: {name}: found no tensor of {dtype}")
        if value.numel() != torch.Size(piece.sizes).numel():
            raise CheckpointError(f"{piece.file}: {name}: found {tuple(value.shape)}")
        return value.reshape(piece.sizes)

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
            tensor, layer = self._tensors[one.name]
            shape = tensor.shape[layer is not None :]
            if shape != one.shape:
                raise CheckpointError(
                    f"{self.where}: {one.name}: found shape {shape}, expected {one.shape}"
                )


def _by_our_names(tensors: dict[str, _Tensor]) -> dict[str, tuple[_Tensor, int | None]]:
    """Each parameter's tensor; of stacked layers with the layer's number in it."""
    found: dict[str, tuple[_Tensor, int | None]] = {}
    for name, tensor in tensors.items():
        if _OTHERS.fullmatch(name):
            continue
        if match := _LAYERS.fullmatch(name):
            for layer in range(tensor.shape[0]):
                found[renamed(f"decoder.layers.{layer}.{match[1]}")] = (tensor, layer)
        else:
            found[renamed(name)] = (tensor, None)
    return found


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """What the metadata says of every tensor."""
    path = folder / METADATA
    try:
        data = read_regular(path, _MAX_METADATA_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    metadata = inert_pickle.read(data, str(path))
    try:
        places = {
            (index.state["fqn"], index.state.get("offset")): info.state
            for index, info in metadata.state["storage_data"].items()
        }
        return {
            name: _tensor(name, record, places, folder)
            for name, record in metadata.state["state_dict_metadata"].items()
            if record.name.endswith(".TensorStorageMetadata") and not _OTHERS.fullmatch(name)
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is no metadata of torch_dist ({error!r})") from None


def _tensor(name: str, record: Record, places: dict[Any, dict[str, Any]], folder: Path) -> _Tensor:
    dtype = _dtype_of(record.state["properties"])
    if dtype not in _DTYPES:
        raise CheckpointError(f"{folder}: {name}: found {dtype}, expected {', '.join(_DTYPES)}")
    pieces = []
    for chunk in record.state["chunks"]:
        offsets, sizes = chunk.state["offsets"], chunk.state["sizes"]
        info = places[name, offsets]
        file = info["relative_path"]
        if Path(file).name != file:
            raise CheckpointError(f"{folder}: {name}: found file {file!r}, expected a name")
        pieces.append(_Piece(offsets, sizes, folder / file, info["offset"], info["length"]))
    return _Tensor(_DTYPES[dtype], tuple(record.state["size"]), tuple(pieces))


def _dtype_of(properties: Record) -> str:
    """torch's name; it is the first of what a TensorProperties is made of."""
    for value in (properties.state.get("dtype"), *_flat(properties.args)):
        if isinstance(value, Record) and value.name.startswith("torch."):
            return value.name
    return "no type"


def _flat(values: Any) -> list[Any]:
    return [v for one in values for v in (_flat(one) if isinstance(one, tuple) else [one])]
