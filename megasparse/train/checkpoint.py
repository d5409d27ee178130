"""What a checkpoint holds, and how it comes back.

Parameters, float32 masters, moments, sparsity state, generators; the position is in the manifest.

What is stored, by key:

    param/NAME                          the model's parameter
    optim/NAME/exp_avg|exp_avg_sq       moments, whole or in ZeRO's pieces
    optim/NAME/master                   float32 masters, with ZeRO
    sparsity/NAME/mask|scale|counters   pattern indices, S-STE's beta, refresh counters
    sparsity/NAME/input_square|_tokens  Wanda's sums over the input channels
    sparsity/NAME/flips                 per tensor-parallel rank, summed on reading
    sparsity/NAME/fp8_*, fp8/NAME/fp8_* delayed FP8 scales of a sparse, of a dense weight's operands
    rng/RANK/NAME                       generator states

Tensors are stored with their place in the whole, so another layout can read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import megasparse
from megasparse.checkpoint.compatibility import check_same_layout
from megasparse.checkpoint.manifest import Piece
from megasparse.checkpoint.model import check_shape, input_shard, mask_shard, sparsity_state
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import choose
from megasparse.checkpoint.writer import Tensors
from megasparse.config import ResolvedConfig, to_dict
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from megasparse.log import logger
from megasparse.megatron.grid import rng_state, set_rng_state
from megasparse.megatron.init import parameter_shard
from megasparse.optim.lr import learning_rate
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.train.engine import zero
from megasparse.train.engine.base import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def layout(engine: Engine) -> dict[str, int]:
    """How the ranks divide model and state; equal layouts resume bit for bit."""
    grid = engine.grid
    return {
        "world": grid.world,
        "tp": grid.tp_size,
        "dp": grid.dp_size,
        "pp": grid.pp_size,
        "zero": engine.config.parallel.zero_stage,
    }


def describe(engine: Engine, digests: dict[str, str], state: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of the run, besides run id and step.

    Args:
        digests: of data and tokenizer.
        state: of the training loop, JSON.
    """
    clock, train = engine.controller.clock, engine.config.train
    return {
        "consumed_samples": clock.samples,
        "layout": layout(engine),
        "optimizer_steps": _optimizer_steps(engine),
        "digests": digests,
        "config": to_dict(engine.config),
        "state": {
            # Functions of the step; written down so that a reader need not compute them.
            "lr": learning_rate(train, clock.step, clock.samples),
            "loss_scale": 1.0,
            "seed": train.seed,
            **state,
        },
        "versions": {"megasparse": megasparse.__version__, "torch": torch.__version__},
    }


def newest_valid(root: Path) -> CheckpointReader | None:
    """The newest intact checkpoint of a folder, every byte verified, for a process alone.

    None if the folder holds none. Damaged ones are named in the log and passed over.

    Raises:
        CheckpointError: there are some, and none is intact.
    """
    return choose(root, ControlPlane(None))


def load(engine: Engine, reader: CheckpointReader) -> None:
    """Put a verified checkpoint into model, optimizer, sparsity state and generators."""
    grid, controller = engine.grid, engine.controller
    for name, parameter in engine.model.named_parameters():
        whole = reader.read(f"param/{name}")
        shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
        check_shape(whole, shard, name, str(reader.folder))
        with torch.no_grad(), engine.layout.gathered_parameters([parameter], write=True):
            parameter.copy_(shard.slice_of(whole))
    _load_optimizer(engine, reader)
    for state, weight in controller.weights:
        if not _has_state(reader, state, engine.config):
            # The run has another recipe: masks begin with the next step.
            if state.quantizers is not None:
                state.quantizers.import_state(_fp8_state(reader, state.name))
            continue
        state.import_state(sparsity_state(reader, state), weight.device)
    for dense, _ in controller.dense:
        dense.import_state(_fp8_state(reader, dense.name))
    controller.clock.step = reader.meta["step"]
    controller.clock.samples = reader.meta["consumed_samples"]
    if check_same_layout(reader, engine.config, layout(engine)):
        prefix = f"rng/{grid.rank}/"
        states = {key.removeprefix(prefix): reader.read(key) for key in reader.keys(prefix)}
        if states.keys() != rng_state(grid).keys():
            raise CheckpointError(
                f"{reader.folder}: generators {sorted(states)}, expected {sorted(rng_state(grid))}"
            )
        set_rng_state(grid, states)
    else:
        logger.warning("the checkpoint was written by another layout (%s)", reader.meta["layout"])


def collect(engine: Engine) -> Tensors:
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
        whole = zero.partition(parameter) is None
        if whole and grid.dp_rank == 0 and (shards[name].dim is not None or grid.tp_rank == 0):
            key = f"param/{name}"
            tensors[key] = (Piece(key, shards[name]), parameter)
    for fragment in engine.fragments:
        shard = shards[fragment.name]
        if fragment.name in copies:
            continue
        part = zero.partition(fragment.parameter)
        if part is not None and (shard.dim is not None or grid.tp_rank == 0):
            key = f"param/{fragment.name}"
            piece = Piece(key, shard, fragment.start, fragment.start + fragment.length)
            tensors[key] = (piece, part.view(-1).narrow(0, 0, fragment.length))
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
        if grid.tp_rank == 0:  # all ranks of a stage share them
            for dense, _ in engine.controller.dense:
                for kind, value in dense.export_state().items():
                    key = f"fp8/{dense.name}/{kind}"
                    tensors[key] = (Piece(key, WeightShard(tuple(value.shape))), value)
    for name, value in rng_state(grid).items():
        key = f"rng/{grid.rank}/{name}"
        tensors[key] = (Piece(key, WeightShard(tuple(value.shape))), value)
    return tensors


def _collect_sparsity(state: SparseWeight, tp_rank: int) -> dict[str, tuple[Piece, torch.Tensor]]:
    tensors: dict[str, tuple[Piece, torch.Tensor]] = {}
    for kind, value in state.export_state().items():
        key = f"sparsity/{state.name}/{kind}"
        if kind == "mask":
            tensors[key] = (Piece(key, mask_shard(state)), value)
        elif kind == "input_square" and state.shard.dim == 1:
            tensors[key] = (Piece(key, input_shard(state)), value)
        elif kind == "flips":
            shard = WeightShard((state.shard.world,), 0, tp_rank, state.shard.world)
            tensors[key] = (Piece(key, shard), value.reshape(1))
        elif tp_rank == 0:
            tensors[key] = (Piece(key, WeightShard(tuple(value.shape))), value)
    return tensors


def _fp8_state(reader: CheckpointReader, name: str) -> dict[str, torch.Tensor]:
    """Delayed FP8 scales of a weight's operands, stored by a sparse or by a dense layer; empty if
    the run before was not in FP8, or was not for this layer."""
    found = {}
    for place in ("sparsity", "fp8"):
        prefix = f"{place}/{name}/"
        for key in reader.keys(f"{prefix}fp8_"):
            found[key.removeprefix(prefix)] = reader.read(key)
    return found


def _has_state(reader: CheckpointReader, state: SparseWeight, config: ResolvedConfig) -> bool:
    """Whether the saved state of a weight is to be taken over."""
    if not config.checkpoint.override_recipe:
        return True  # if it is missing, reading it is an error
    before, now = reader.meta["config"]["sparsity"], to_dict(config)["sparsity"]
    same = before["sparsity_recipe"] == now["sparsity_recipe"]
    return same and f"sparsity/{state.name}/counters" in reader


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
            local = fragment.of_parameter(shard.slice_of(cache[key]))
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
