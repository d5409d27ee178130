"""A checkpoint as a model: its parameters whole, as they are stored or as the GEMMs use them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.directory import checkpoint_root
from megasparse.checkpoint.manifest import MANIFEST
from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import choose, open_together
from megasparse.checkpoint.sparsity_state import effective_part, effective_weight, run_length
from megasparse.config import CompleteModel, RunConfig, from_dict, narrowed
from megasparse.config.shapes import VOCABULARY
from megasparse.convert.huggingface.layout import parameter_shapes
from megasparse.convert.source import check_shape, require_finite
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from megasparse.sparsity import schedule, slorb
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.weight_scale import scaled
from megasparse.tensor_files import Entry

# SLoRB's S and P beside a layer's `.weight`.
ADAPTER, PROJECTION = ".slorb_adapter", ".slorb_projection"
# CAST's scales there.
SCALE = ".weight_scale"


class StoredModel:
    """A checkpoint of a run as a `Source` (convert/source.py).

    Args:
        reader: of the checkpoint.
        effective: give a sparse layer's W~, with mask and scale applied, as its GEMMs use it at
            this step; else the dense master weight.
        dtype: weights are given in; None: as stored.
        vocab_size: before padding; None: what the checkpoint says.
        fold: with SLoRB give `W~ + S P`, which computes the layer and is no longer 2:4; else W~
            alone (`low_rank` has the rest). Dense master weights never have it.

    Attributes:
        recipe, step, train_iters: of the run.
        optimizer_steps: that the moments have seen; 0: it holds none.
        boosted: names of the parameters that SLoRB adds to.
        sparse: names of the parameters that are 2:4 at this step.

    Raises:
        CheckpointError: it holds a parameter that the model does not have, or lacks one.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        effective: bool = True,
        dtype: torch.dtype | None = None,
        vocab_size: int | None = None,
        fold: bool = True,
    ) -> None:
        self.reader, self._effective, self._dtype = reader, effective, dtype
        self.where = str(reader.folder)
        self.config: RunConfig = from_dict(reader.meta["config"], self.where)
        self.step: int = reader.meta["step"]
        self.optimizer_steps: int = reader.meta["optimizer_steps"]
        self.recipe: SparsityRecipe = recipe_of(self.config)
        self.config.model.vocab_size = vocab_size or _vocab_size(reader, self.config)
        self.model = narrowed(CompleteModel, self.config.model, self.where)
        self.origin: dict[str, Any] = {
            "format": "megasparse",
            "folder": str(reader.folder.absolute()),
            "run_id": reader.meta["run_id"],
            "step": self.step,
            "recipe": self.recipe.name,
        }
        self._shapes = parameter_shapes(self.model)
        self._fold = fold
        self.boosted = frozenset(
            key.removeprefix("param/").removesuffix(ADAPTER) + ".weight"
            for key in reader.keys("param/")
            if key.endswith(ADAPTER)
        )
        self._scaled = frozenset(
            key.removeprefix("param/").removesuffix(SCALE) + ".weight"
            for key in reader.keys("param/")
            if key.endswith(SCALE)
        )
        self._check()
        names = [key.split("/")[1] for key in reader.keys("sparsity/") if key.endswith("/counters")]
        self.train_iters = run_length(reader)
        self.phase = schedule.span_at(self.recipe, self.step, self.train_iters).recipe
        self.pruned = frozenset(names if self.phase.is_sparse else ())
        self.sparse = self.pruned - self.boosted if fold else self.pruned

    def entries(self) -> list[Entry]:
        return [
            Entry(name, self._dtype or self._stored_dtype(name), shape)
            for name, shape in self._shapes.items()
        ]

    def read(self, name: str) -> torch.Tensor:
        if self._effective and name in self.pruned:
            value = effective_weight(self.reader, name, self.recipe)
        else:
            value = self.reader.read(f"param/{name}")
        if name in self._scaled:
            value = scaled(value, self._scale_of(name))
        if self._effective and self._fold and name in self.boosted:
            value = slorb.fold(value, *self.low_rank(name))
        if name in VOCABULARY:
            value = value[: self.model.vocab_size].contiguous()
        if tuple(value.shape) != self._shapes[name]:
            raise CheckpointError(
                f"{self.where}: {name}: found shape {tuple(value.shape)}, expected "
                f"{self._shapes[name]}"
            )
        require_finite(value, f"{self.where}: {name}")
        return value.to(self._dtype or value.dtype)

    def read_part(self, name: str, shard: WeightShard) -> torch.Tensor:
        """A rank's part of a parameter; only its own bytes are read.

        (But where S-STE's scale is to be computed, as it is of the whole weight.)
        """
        value: torch.Tensor
        if self._effective and name in self.pruned:
            value = effective_part(self.reader, name, self.recipe, shard)
        elif name in VOCABULARY:
            value = self._rows(f"param/{name}", name, shard)
        else:
            check_shape(self.reader.shape(f"param/{name}"), shard, name, self.where)
            value = self.reader.read_part(Piece(f"param/{name}", shard)).view(shard.local_shape)
        if name in self._scaled:
            scale = self._scale_of(name)
            columns = shard.global_shape[1] // scale.shape[1]
            value = value * shard.slice_of(scale.repeat_interleave(columns, 1))
        if self._effective and self._fold and name in self.boosted:
            value = self._boosted(value, name, shard)
        require_finite(value, f"{self.where}: {name}")
        return value.to(self._dtype or value.dtype)

    def moment_part(self, name: str, kind: str, shard: WeightShard) -> torch.Tensor | None:
        """A rank's part of a moment of Adam, as `read_part`; None: there is none.

        Args:
            kind: one of `convert.optimizer_state.MOMENTS`.
        """
        key = f"optim/{name}/{kind}"
        if key not in self.reader:
            return None
        if name in VOCABULARY:
            value = self._rows(key, name, shard)
        else:
            check_shape(self.reader.shape(key), shard, name, self.where)
            value = self.reader.read_part(Piece(key, shard)).view(shard.local_shape)
        require_finite(value, f"{self.where}: {kind} of {name}")
        return value

    def _rows(self, key: str, name: str, shard: WeightShard) -> torch.Tensor:
        """Of a vocabulary that may be padded to another size; padding is zero."""
        stored = self.reader.shape(key)
        if len(stored) != 2 or stored[0] < self.model.vocab_size:
            check_shape(stored, shard, name, self.where)
        check_shape((shard.global_shape[0], *stored[1:]), shard, name, self.where)
        (rows,) = shard.slices(0)
        end = min(rows.global_start + rows.length, self.model.vocab_size)
        have, width = max(end - rows.global_start, 0), stored[1]
        start = rows.global_start * width
        part = Piece(key, WeightShard(stored), start, start + have * width)
        value = torch.zeros(rows.length, width, dtype=self.reader.dtype(key))
        if have:
            value[:have] = self.reader.read_part(part).view(have, width)
        return value

    def _boosted(self, value: torch.Tensor, name: str, shard: WeightShard) -> torch.Tensor:
        """A part of a weight with S P added: its rows of S, or its columns of P."""
        adapter, projection = self.low_rank(name)
        columns, rank = shard.global_shape[1], adapter.shape[1]
        if shard.dim == 0:
            own = dataclasses.replace(shard, global_shape=tuple(adapter.shape))
            return slorb.fold(value, own.slice_of(adapter), projection)
        if shard.dim == 1:
            if projection is None:  # sums over groups of columns
                ones = torch.eye(rank, dtype=adapter.dtype)
                projection = ones.repeat_interleave(columns // rank, 1)
            own = dataclasses.replace(shard, global_shape=(rank, columns))
            projection = own.slice_of(projection)
        return slorb.fold(value, adapter, projection)

    def _scale_of(self, name: str) -> torch.Tensor:
        """CAST's scales `(N, n)` of a weight, which belong to it whether it is pruned or not."""
        return self.reader.read(f"param/{name.removesuffix('.weight')}{SCALE}")

    def frozen_scales(self) -> dict[str, float]:
        if self.reader.imported:
            scales: dict[str, float] = self.reader.meta["state"].get("scales", {})
            return scales
        keys = {f"sparsity/{name}/scale": name for name in self._shapes}
        frozen = self.recipe.s_ste_scale == "frozen"
        folded_in = self.pruned if self._effective else frozenset()
        return {
            name: float(self.reader.read(key))
            for key, name in keys.items()
            if frozen and key in self.reader and name not in folded_in
        }

    def low_rank(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """SLoRB's S `(N, R)` and P `(R, K)` of a boosted weight; P None for sums over groups."""
        base = f"param/{name.removesuffix('.weight')}"
        projection = f"{base}{PROJECTION}"
        return (
            self.reader.read(f"{base}{ADAPTER}"),
            self.reader.read(projection) if projection in self.reader else None,
        )

    def _stored_dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(f"param/{name}")

    def _check(self) -> None:
        stored = {key.removeprefix("param/") for key in self.reader.keys("param/")}
        boosts = {name.removesuffix(".weight") for name in self.boosted & self._shapes.keys()}
        stored -= {base + part for base in boosts for part in (ADAPTER, PROJECTION)}
        stored -= {
            name.removesuffix(".weight") + SCALE for name in self._scaled & self._shapes.keys()
        }
        if missing := sorted(self._shapes.keys() - stored):
            raise CheckpointError(f"{self.where}: holds no parameter {missing[0]}")
        if unknown := sorted(stored - self._shapes.keys()):
            raise CheckpointError(
                f"{self.where}: holds {len(unknown)} parameters that its model does not have, the "
                f"first is {unknown[0]}"
            )


def open_checkpoint(path: Path, control: ControlPlane) -> CheckpointReader:
    """A verified checkpoint: one by its own folder, or the newest intact one of a run.

    Args:
        path: of a checkpoint (`step-...`), of a folder with checkpoints, or of a run.
        control: of all ranks; a collective call.

    Raises:
        CheckpointError: none is there, or it is damaged.
    """
    if control.on_rank_zero(lambda: (path / MANIFEST).is_file()):
        return open_together(path, control)
    root = Path(control.on_rank_zero(lambda: str(checkpoint_root(path))))  # JSON travels
    reader = choose(root, control)
    if reader is None:
        raise CheckpointError(f"{path}: holds no checkpoint")
    return reader


def _vocab_size(reader: CheckpointReader, config: RunConfig) -> int:
    """Tokens before padding, as the run knew them."""
    size = reader.meta["state"].get("vocab_size") or config.model.vocab_size
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(
            f"{reader.folder}: does not say how many tokens it has before padding (--vocab-size)"
        )
    return size
