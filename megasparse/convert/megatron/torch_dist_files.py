"""The tensors of a `torch_dist` checkpoint: what its metadata says of them, and their values.

    iter_0000100/  .metadata      every tensor's shape and type, and where its pieces are: a pickle
                   __0_0.distcp   pieces one after the other, each as `torch.save` writes it

Tensors are whole there, whatever the layout of the writer. Nothing that is in the files is run.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.convert.megatron import inert_pickle
from megasparse.convert.megatron.inert_pickle import Record
from megasparse.errors import CheckpointError
from megasparse.input_files import open_regular, read_regular

METADATA = ".metadata"
_MAX_METADATA_BYTES = 1 << 31
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: where it begins, its shape, and its place in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int

    def data(self, name: str) -> bytes:
        """What `torch.save` has written.

        Raises:
            CheckpointError: cannot be read.
        """
        try:
            with open_regular(self.file) as stream:
                stream.seek(self.start)
                return stream.read(self.length)
        except (OSError, OverflowError, ValueError) as error:
            raise CheckpointError(f"{self.file}: {name}: cannot be read: {error}") from None

    def value(self, dtype: torch.dtype, name: str) -> torch.Tensor:
        """Of shape `sizes`.

        Args:
            name: of the tensor, for messages.

        Raises:
            CheckpointError: damaged, or of another type or size.
        """
        data = self.data(name)
        try:
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # zip files and pickles raise of everything
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self.file}: {name}: cannot be read: {reason}") from None
        if not isinstance(value, torch.Tensor) or value.dtype != dtype:
            raise CheckpointError(f"{self.file}: {name}: found no tensor of {dtype}")
        if value.numel() != torch.Size(self.sizes).numel():
            raise CheckpointError(f"{self.file}: {name}: found {tuple(value.shape)}")
        return value.reshape(self.sizes)


@dataclass(frozen=True)
class DistTensor:
    """A whole tensor of the checkpoint, or one layer of a stack of all layers.

    Attributes:
        name: in the checkpoint.
        dtype_name: torch's.
        stacked: its shape in the checkpoint.
        pieces: that it is made of.
        folder: of the checkpoint, for messages.
        layer: along the first dimension of `stacked`; None: the whole tensor.
    """

    name: str
    dtype_name: str
    stacked: tuple[int, ...]
    pieces: tuple[Piece, ...]
    folder: Path
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the dimension of the layers."""
        return self.stacked[self.layer is not None :]

    @property
    def dtype(self) -> torch.dtype:
        """Of the values.

        Raises:
            CheckpointError: as `check_dtype`.
        """
        self.check_dtype()
        return _DTYPES[self.dtype_name]

    def check_dtype(self) -> None:
        """Refuse a type that weights do not have.

        Raises:
            CheckpointError: it is one.
        """
        if self.dtype_name not in _DTYPES:
            raise CheckpointError(
                f"{self.folder}: {self.name}: found {self.dtype_name}, expected "
                f"{', '.join(_DTYPES)}"
            )

    def read(self) -> torch.Tensor:
        """The values, on the CPU.

        Raises:
            CheckpointError: damaged, or the pieces do not make it up.
        """
        whole, filled = torch.empty(self.shape, dtype=self.dtype), 0
        for piece in self.pieces:
            offsets, inside = piece.offsets, None
            if self.layer is not None:
                inside, offsets = self.layer - offsets[0], offsets[1:]
                if not 0 <= inside < piece.sizes[0]:
                    continue
            value = piece.value(self.dtype, self.name)
            value = value if inside is None else value[inside]
            place = tuple(slice(o, o + n) for o, n in zip(offsets, value.shape, strict=True))
            whole[place] = value
            filled += value.numel()
        if filled != whole.numel():
            raise CheckpointError(
                f"{self.folder}: {self.name}: pieces of {filled} values, expected {whole.numel()}"
            )
        return whole


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, by the names in it: tensors, and objects of other kinds."""

    tensors: dict[str, DistTensor]
    objects: dict[str, Piece]


def read_metadata(folder: Path) -> Contents:
    """What the metadata says.

    Raises:
        CheckpointError: missing, damaged, or of another kind.
    """
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
        tensors, objects = {}, {}
        for name, record in metadata.state["state_dict_metadata"].items():
            if record.name.endswith(".TensorStorageMetadata"):
                tensors[name] = _tensor(name, record, places, folder)
            elif (name, None) in places:
                objects[name] = _piece(name, (), (), places[name, None], folder)
        return Contents(tensors, objects)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is no metadata of torch_dist ({error!r})") from None


def _tensor(
    name: str, record: Record, places: dict[Any, dict[str, Any]], folder: Path
) -> DistTensor:
    pieces = []
    for chunk in record.state["chunks"]:
        offsets, sizes = chunk.state["offsets"], chunk.state["sizes"]
        pieces.append(_piece(name, offsets, sizes, places[name, offsets], folder))
    dtype = _dtype_of(record.state["properties"])
    return DistTensor(name, dtype, tuple(record.state["size"]), tuple(pieces), folder)


def _piece(
    name: str,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    info: dict[str, Any],
    folder: Path,
) -> Piece:
    file = info["relative_path"]
    if Path(file).name != file:
        raise CheckpointError(f"{folder}: {name}: found file {file!r}, expected a name")
    return Piece(offsets, sizes, folder / file, info["offset"], info["length"])


def _dtype_of(properties: Record) -> str:
    """torch's name; it is the first of what a TensorProperties is made of."""
    for value in (properties.state.get("dtype"), *_flat(properties.args)):
        if isinstance(value, Record) and value.name.startswith("torch."):
            return value.name
    return "no type"


def _flat(values: Any) -> list[Any]:
    return [v for one in values for v in (_flat(one) if isinstance(one, tuple) else [one])]
