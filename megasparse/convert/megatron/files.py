"""Megatron's `.pt` files, read without running anything that is in them.

Layouts, each by the folder of an iteration or the folder that holds it:

    iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt            Megatron-LM, Megatron-core
    global_step100/mp_rank_TT_model_states.pt                   Megatron-DeepSpeed
    global_step100/layer_NN-model_TT-model_states.pt            the same with its PipelineModule

Files are loaded with `weights_only`: tensors and plain containers. Megatron also pickles its
arguments, enums and NumPy generator states; what is named like these becomes an inert record, and a
file that names anything else is refused.
"""

from __future__ import annotations

import argparse
import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from megasparse.errors import CheckpointError
from megasparse.input_files import read_regular, refuse_links

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_DEEPSPEED = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
_INERT = (
    "argparse.Namespace", "types.SimpleNamespace", "megatron.", "deepspeed.", "numpy.",
    "pathlib.PosixPath", "pathlib.Path", "_codecs.encode", "collections.deque", "functools.partial",
    "signal.Signals",
)  # fmt: skip


class Record:
    """What stands for a pickled object: its attributes, and no behaviour."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class MegatronFiles:
    """The files of one checkpoint.

    Args:
        path: of an iteration, or of the folder with its name in `latest_checkpointed_iteration.txt`
            or `latest`.

    Attributes:
        tp, pp: tensor-parallel ranks and pipeline stages.
        kind: "megatron", "deepspeed" or "deepspeed-pipeline".

    Raises:
        CheckpointError: none of the layouts, or a file is missing.
    """

    def __init__(self, path: Path) -> None:
        self.folder = iteration_folder(path)
        refuse_links(self.folder, CheckpointError)
        names = sorted(entry.name for entry in self.folder.iterdir())
        self._layers = {
            (int(m[1]), int(m[2])): self.folder / m[0] for n in names if (m := _LAYER.fullmatch(n))
        }
        plain = {int(m[1]): self.folder / m[0] for n in names if (m := _DEEPSPEED.fullmatch(n))}
        ranks = {
            (int(m[1]), int(m[2] or 0)): _model_file(self.folder / m[0])
            for n in names
            if (m := _RANK.fullmatch(n)) and (self.folder / n).is_dir()
        }
        if self._layers:
            self.kind, self._files = "deepspeed-pipeline", {}
            self._first = plain.get(0)
            self.tp, self.pp = 1 + max(rank for _, rank in self._layers), 1
        elif plain:
            self.kind, self._files = "deepspeed", {(rank, 0): p for rank, p in plain.items()}
            self._first = plain.get(0)
            self.tp, self.pp = 1 + max(plain), 1
        elif ranks:
            self.kind, self._files = "megatron", ranks
            self._first = ranks.get((0, 0))
            self.tp, self.pp = (1 + max(place[axis] for place in ranks) for axis in (0, 1))
        else:
            raise CheckpointError(
                f"{self.folder}: found no mp_rank_00/{_MODEL_FILES[0]}, "
                "mp_rank_00_model_states.pt or layer_*-model_00-model_states.pt"
            )
        self._check_whole()

    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments, as they were saved.

        Raises:
            CheckpointError: none are in the file.
        """
        assert self._first is not None
        return arguments_of(load_weights(self._first), self._first)

    def stages(self, rank: int) -> list[dict[str, torch.Tensor]]:
        """Tensors of one tensor-parallel rank by the writer's names: one dict a pipeline stage,
        or a layer of a PipelineModule. Values are mapped from the files until they are used."""
        if self.kind == "deepspeed-pipeline":
            numbers = sorted({layer for layer, _ in self._layers})
            return [
                _tensors(load_weights(self._layers[number, rank]), self._layers[number, rank])
                for number in numbers
            ]
        key = "module" if self.kind == "deepspeed" else "model"
        found = []
        for stage in range(self.pp):
            path = self._files[rank, stage]
            content = load_weights(path)
            if "model0" in content:
                raise CheckpointError(f"{path}: interleaved pipeline stages, expected one model")
            if not isinstance(content.get(key), dict):
                raise CheckpointError(f"{path}: holds no {key!r}")
            found.append(_tensors(content[key], path))
        return found

    def _check_whole(self) -> None:
        if self.kind == "deepspeed-pipeline":
            layers = {layer for layer, _ in self._layers}
            for layer in layers:
                for rank in range(self.tp):
                    if (layer, rank) not in self._layers:
                        name = f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
                        raise CheckpointError(f"{self.folder / name}: missing")
        for rank in range(self.tp):
            for stage in range(self.pp):
                if self._files and (rank, stage) not in self._files:
                    raise CheckpointError(
                        f"{self.folder}: the file of tensor-parallel rank {rank}, pipeline stage "
                        f"{stage} is missing"
                    )
        if self._first is None:
            raise CheckpointError(f"{self.folder}: mp_rank_00_model_states.pt is missing")


def arguments_of(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Megatron's arguments in the content of a file.

    Raises:
        CheckpointError: none are in it, or it is of a version that orders QKV otherwise.
    """
    version = content.get("checkpoint_version", 3.0)
    if not isinstance(version, (int, float)) or version < 3.0:
        raise CheckpointError(
            f"{path}: checkpoint_version {version}, expected 3.0 (another order of QKV)"
        )
    arguments = content.get("args")
    # Megatron-core lets torch load a Namespace as itself, once it has been imported.
    if not isinstance(arguments, (Record, argparse.Namespace, dict)):
        raise CheckpointError(f"{path}: holds no args of Megatron, which say the sizes")
    return dict(arguments) if isinstance(arguments, dict) else dict(vars(arguments))


def load_weights(path: Path) -> dict[str, Any]:
    """A `.pt` file as plain containers and tensors; nothing in it is executed.

    Raises:
        CheckpointError: damaged, or it names an object that is neither.
    """
    content = load_inert(path, str(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: found {type(content).__name__}, expected a dict")
    return content


def load_inert(file: Path | bytes, path: str) -> Any:
    """What `torch.save` has written, as plain containers and tensors; nothing in it is executed.

    Args:
        file: its bytes, or where they are: then they are mapped until they are used.
        path: for messages.

    Raises:
        CheckpointError: damaged, or it names an object that is neither.
    """

    def opened() -> Path | io.BytesIO:
        return file if isinstance(file, Path) else io.BytesIO(file)

    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(opened())
        if strange := [name for name in named if not name.startswith(_INERT)]:
            raise CheckpointError(
                f"{path}: names {', '.join(sorted(strange))}, expected tensors and plain values"
            )
        inert = [(Record, name) for name in named]
        with torch.serialization.safe_globals(inert), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")
            mapped = isinstance(file, Path)
            return torch.load(opened(), map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except Exception as error:  # pickle and zip files raise of everything
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be loaded: {reason}") from None


def iteration_folder(path: Path) -> Path:
    """The folder of an iteration: the path, or what it points to.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no folder, expected a Megatron checkpoint")
    for pointer in ("latest_checkpointed_iteration.txt", "latest"):
        try:
            text = read_regular(path / pointer, 4096).decode("utf-8").strip()
        except (OSError, ValueError):
            continue
        name = f"iter_{int(text):07d}" if text.isdecimal() else text
        if Path(name).name != name or not (path / name).is_dir():
            raise CheckpointError(f"{path / pointer}: names {text!r}, which is no folder there")
        return path / name
    return path


def _model_file(folder: Path) -> Path:
    for name in _MODEL_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: holds no {_MODEL_FILES[0]}")


def _tensors(tree: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Nested dicts -> tensors by dotted name."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": t for name, t in _tensors(value, path).items()})
        elif isinstance(value, torch.Tensor):
            flat[str(key)] = value
    return flat
