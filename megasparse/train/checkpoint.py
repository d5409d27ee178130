"""Save and load a run: parameters, float32 masters, moments, sparsity state, generators, position.

What is stored, by key:

    param/NAME                          the model's parameter
    optim/NAME/exp_avg|exp_avg_sq       moments, whole or in ZeRO's pieces
    optim/NAME/master                   float32 masters, with ZeRO
    sparsity/NAME/mask|scale|counters   pattern indices, S-STE's beta, refresh counters
    sparsity/NAME/flips                 per tensor-parallel rank, summed on reading
    rng/RANK/NAME                       generator states

Tensors are stored with their place in the whole, so another layout can read them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasparse.config import to_dict
from megasparse.errors import CheckpointError
from megasparse.log import logger
from megasparse.megatron.grid import rng_state, set_rng_state
from megasparse.megatron.init import parameter_shard
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.train import zero
from megasparse.train.engine import Engine
from megasparse.train.storage import (
    CheckpointReader,
    Piece,
    list_steps,
    publish,
    step_folder,
    write_rank_file,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(engine: Engine, root: Path, digests: dict[str, str], keep_last: int) -> Path:
    """Write a checkpoint of the current step; all ranks take part.

    Args:
        root: folder of checkpoints.
        digests: of data and tokenizer.
        keep_last: newest checkpoints to keep; 0: all.

    Returns:
        The published folder.

    Raises:
        CheckpointError: on every rank, when any rank could not write; nothing is published.
    """
    grid, clock = engine.grid, engine.controller.clock
    final = step_folder(root, clock.step)
    temporary = root / f".{final.name}.tmp"
    if grid.rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    _barrier(grid.world)
    record: Any
    try:
        record = write_rank_file(temporary, grid.rank, _collect(engine))
    except OSError as error:
        record = f"rank {grid.rank}: {temporary}: {error}"
    records: list[Any] = [record] * grid.world
    if grid.world > 1:
        dist.all_gather_object(records, record)
    failures = [entry for entry in records if isinstance(entry, str)]
    if failures:
        if grid.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError("; ".join(failures))
    if grid.rank == 0:
        config = engine.config
        meta = {
            "step": clock.step,
            "consumed_samples": clock.step * (config.train.global_batch_size or 0),
            "layout": {
                "world": grid.world,
                "tp": grid.tp_size,
                "dp": grid.dp_size,
                "pp": grid.pp_size,
                "zero": config.parallel.zero_stage,
            },
            "optimizer_steps": _optimizer_steps(engine),
            "digests": digests,
            "config": to_dict(config),
        }
        publish(temporary, final, records, meta)
        if keep_last:
            for step in list_steps(root)[keep_last:]:
                shutil.rmtree(step_folder(root, step))
    _barrier(grid.world)
    return final


def newest_valid(root: Path) -> CheckpointReader | None:
    """The newest checkpoint whose every byte is as written; damaged ones are passed with a warning.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    steps = list_steps(root)
    for step in steps:
        try:
            return CheckpointReader(step_folder(root, step))
        except CheckpointError as error:
            logger.warning("%s; trying the checkpoint before it", error)
    if steps:
        raise CheckpointError(f"{root}: none of its {len(steps)} checkpoints is intact")
    return None


def load(engine: Engine, reader: CheckpointReader) -> None:
    """Put a verified checkpoint into model, optimizer, sparsity state and generators."""
    grid, controller = engine.grid, engine.controller
    for name, parameter in engine.model.named_parameters():
        whole = reader.read(f"param/{name}")
        shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
        if tuple(whole.shape) != shard.global_shape:
            raise CheckpointError(
                f"{reader.folder}: {name} has shape {tuple(whole.shape)}, "
                f"the model expects {shard.global_shape}"
            )
        with torch.no_grad():
            parameter.copy_(shard.take(whole))
    _load_optimizer(engine, reader)
    for state, weight in controller.weights:
        state.import_state(_sparsity_state(reader, state), weight.device)
    controller.clock.step = reader.meta["step"]
    if reader.meta["layout"] == {
        "world": grid.world,
        "tp": grid.tp_size,
        "dp": grid.dp_size,
        "pp": grid.pp_size,
        "zero": engine.config.parallel.zero_stage,
    }:
        prefix = f"rng/{grid.rank}/"
        states = {key.removeprefix(prefix): reader.read(key) for key in reader.keys(prefix)}
        set_rng_state(grid, states)
    else:
        logger.warning(
            "the checkpoint was written by another layout (%s): dropout continues with new draws",
            reader.meta["layout"],
        )


def effective_weight(reader: CheckpointReader, name: str, recipe: SparsityRecipe) -> torch.Tensor:
    """W~ `(N, K)` of a stored sparse weight, whole, on the CPU."""
    whole = reader.read(f"param/{name}")
    state = SparseWeight(name, recipe, WeightShard(tuple(whole.shape)))
    state.import_state(_sparsity_state(reader, state), torch.device("cpu"))
    return state.effective(whole)


def _collect(engine: Engine) -> dict[str, tuple[Piece, torch.Tensor]]:
    """This rank's share of the checkpoint."""
    grid = engine.grid
    tensors: dict[str, tuple[Piece, torch.Tensor]] = {}
    shards = {
        name: parameter_shard(parameter, grid.tp_rank, grid.tp_size)
        for name, parameter in engine.model.named_parameters()
    }
    # Of replicas the first writes; a replicated parameter is the same on all tensor-parallel ranks.
    copies = {name for name, p in engine.model.named_parameters() if zero.is_copy(p)}
    for name, parameter in engine.model.named_parameters():
        if name in copies:
            continue
        if grid.dp_rank == 0 and (shards[name].dim is not None or grid.tp_rank == 0):
            key = f"param/{name}"
            tensors[key] = (Piece(key, shards[name]), parameter)
    for fragment in engine.fragments:
        shard = shards[fragment.name]
        if fragment.name in copies:
            continue
        whole_here = fragment.parameter is fragment.tensor
        if (whole_here and grid.dp_rank) or (shard.dim is None and grid.tp_rank):
            continue
        moments = engine.optimizer.state.get(fragment.tensor, {})
        values = {m: moments[m] for m in MOMENTS if m in moments}
        if not whole_here:  # without ZeRO the parameter is its own master
            values["master"] = fragment.tensor.data
        for kind, value in values.items():
            key = f"optim/{fragment.name}/{kind}"
            piece = Piece(key, shard, fragment.start, fragment.start + fragment.length)
            tensors[key] = (piece, fragment.of(value))
    if grid.dp_rank == 0:
        for state, _ in engine.controller.weights:
            tensors.update(_collect_sparsity(state, grid.tp_rank))
    for name, value in rng_state(grid).items():
        key = f"rng/{grid.rank}/{name}"
        tensors[key] = (Piece(key, WeightShard(tuple(value.shape))), value)
    return tensors


def _collect_sparsity(state: SparseWeight, tp_rank: int) -> dict[str, tuple[Piece, torch.Tensor]]:
    tensors: dict[str, tuple[Piece, torch.Tensor]] = {}
    for kind, value in state.export_state().items():
        key = f"sparsity/{state.name}/{kind}"
        if kind == "mask":
            tensors[key] = (Piece(key, _mask_shard(state)), value)
        elif kind == "flips":
            shard = WeightShard((state.shard.world,), 0, tp_rank, state.shard.world)
            tensors[key] = (Piece(key, shard), value.reshape(1))
        elif tp_rank == 0:
            tensors[key] = (Piece(key, WeightShard(tuple(value.shape))), value)
    return tensors


def _mask_shard(state: SparseWeight) -> WeightShard:
    """Where the local pattern indices lie: the weight's shard in units of blocks or groups."""
    rows, columns = state.shard.global_shape
    height = 4 if state.recipe.transposable else 1
    shard = state.shard
    return WeightShard(
        (rows // height, columns // 4), shard.dim, shard.rank, shard.world, shard.parts
    )


def _sparsity_state(reader: CheckpointReader, state: SparseWeight) -> dict[str, torch.Tensor]:
    prefix = f"sparsity/{state.name}/"
    loaded = {key.removeprefix(prefix): reader.read(key) for key in reader.keys(prefix)}
    if "counters" not in loaded:
        raise CheckpointError(f"{reader.folder}: holds no sparsity state of {state.name}")
    if "mask" in loaded:
        loaded["mask"] = _mask_shard(state).take(loaded["mask"])
    if "flips" in loaded:
        # Counts of other ranks cannot be told apart in another layout: the first takes them all.
        same = loaded["flips"].numel() == state.shard.world
        total = loaded["flips"][state.shard.rank] if same else loaded["flips"].sum()
        loaded["flips"] = total if same or state.shard.rank == 0 else torch.zeros_like(total)
    return loaded


def _load_optimizer(engine: Engine, reader: CheckpointReader) -> None:
    steps = reader.meta["optimizer_steps"]
    optimizer, grid = engine.optimizer, engine.grid
    cache: dict[str, torch.Tensor] = {}
    for fragment in engine.fragments:
        shard = parameter_shard(fragment.parameter, grid.tp_rank, grid.tp_size)
        for kind in ("master", *MOMENTS):
            key = f"optim/{fragment.name}/{kind}"
            if key not in reader:
                if kind != "master":
                    continue
                key = f"param/{fragment.name}"
            cache = {key: cache.get(key, reader.read(key))}
            local = fragment.of_parameter(shard.take(cache[key]))
            if kind == "master":
                target = fragment.tensor.data
            else:
                state = optimizer.state[fragment.tensor]
                state.setdefault("step", torch.tensor(float(steps)))
                target = state.setdefault(kind, torch.zeros_like(fragment.tensor))
            fragment.of(target).copy_(local.to(target.dtype))


def _optimizer_steps(engine: Engine) -> int:
    for state in engine.optimizer.state.values():
        return int(state["step"])
    return 0


def _barrier(world: int) -> None:
    if world > 1:
        dist.barrier()


def check_writable(root: str | os.PathLike) -> None:
    """Refuse a folder that checkpoints could not be written to, before training starts."""
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be written: {error.strerror}") from None
