"""What a checkpoint holds; `resume.py` puts it back.

Parameters, float32 masters, moments, sparsity state, generators; the position is in the manifest.

What is stored, by key:

    param/NAME                          the model's parameter
    optim/NAME/exp_avg|exp_avg_sq       moments, whole or in ZeRO's pieces
    optim/NAME/master                   float32 masters, with ZeRO
    sparsity/NAME/mask|scale|counters   pattern indices, S-STE's beta, refresh counters
    sparsity/NAME/input_square|_tokens  Wanda's sums over the input channels
    sparsity/NAME/flips                 per tensor-parallel rank (and block of experts), summed on
                                        reading
    sparsity/NAME/fp8_*, fp8/NAME/fp8_* delayed FP8 scales of a sparse, of a dense weight's operands
    rng/RANK/NAME                       generator states

Tensors are stored with their place in the whole, so another layout can read them. What all
data-parallel ranks have alike they write in equal shares, each value once; experts that they share
are written by the ranks that have the same ones. A scale for each expert is one tensor `(E,)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import megasparse
from megasparse.checkpoint.pieces import Piece, Share, divide, owners
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import choose
from megasparse.checkpoint.sparsity_state import flips_shard, input_shard, mask_shard, scale_shard
from megasparse.checkpoint.writer import Tensors
from megasparse.config import to_dict
from megasparse.convert.optimizer_state import MOMENTS
from megasparse.distributed.control_plane import ControlPlane
from megasparse.megatron.grid import is_divided_expert, rng_state
from megasparse.megatron.init import parameter_shard
from megasparse.optim.lr import learning_rate
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.train.engine import zero
from megasparse.train.engine.base import Engine

DENSE_FP8_OWNER = 0  # data-parallel rank that writes the scales of all dense weights, a few numbers


def layout(engine: Engine) -> dict[str, int]:
    """How the ranks divide model and state; equal layouts resume bit for bit."""
    grid = engine.grid
    divided = {"ep": grid.ep_size} if grid.ep_size > 1 else {}
    return {
        "world": grid.world,
        "tp": grid.tp_size,
        "cp": grid.cp_size,
        "dp": grid.dp_size,
        "pp": grid.pp_size,
        "zero": engine.config.parallel.zero_stage,
        **divided,
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


def parameter_shares(engine: Engine) -> dict[str, list[Share]]:
    """How the ranks that hold the same divide what each of them has whole, by parameter.

    They write it once, in equal shares, and read it so. Parameters of ZeRO 3 are no such thing.
    """
    named = [(n, p) for n, p in engine.model.named_parameters() if zero.partition(p) is None]
    found: dict[str, list[Share]] = {}
    for divided in (False, True):
        kind = [(n, p) for n, p in named if is_divided_expert(p) == divided]
        world = engine.grid.expert_replicas.size if divided else engine.grid.dp_cp_size
        shares = divide([p.numel() for _, p in kind], world)
        found |= {name: own for (name, _), own in zip(kind, shares, strict=True)}
    return found


def state_owners(engine: Engine) -> list[int]:
    """The rank, among those that hold the same, that writes each sparse weight's state, in order
    of the weights."""
    found = [0] * len(engine.controller.weights)
    for divided in (False, True):
        kind = [
            (number, weight.numel())
            for number, (_, weight) in enumerate(engine.controller.weights)
            if is_divided_expert(weight) == divided
        ]
        world = engine.grid.expert_replicas.size if divided else engine.grid.dp_cp_size
        for (number, _), owner in zip(kind, owners([s for _, s in kind], world), strict=True):
            found[number] = owner
    return found


def collect(engine: Engine) -> Tensors:
    """This rank's share of the checkpoint."""
    grid, tensors = engine.grid, Tensors()
    parameters = dict(engine.model.named_parameters())
    shards = {n: parameter_shard(p, grid.tp_rank, grid.tp_size) for n, p in parameters.items()}
    # Of replicas one writes; a replicated parameter is the same on all tensor-parallel ranks.
    mine = {
        name
        for name, parameter in parameters.items()
        if not zero.is_copy(parameter) and (shards[name].dim is not None or grid.tp_rank == 0)
    }
    own = {
        name: share
        for name, shares in parameter_shares(engine).items()
        for share in shares
        if name in mine and share.rank == grid.replicas_of(parameters[name]).rank
    }

    def add(key: str, name: str, start: int, flat: torch.Tensor) -> None:
        tensors[key] = (Piece(key, shards[name], start, start + flat.numel()), flat)

    for name, share in own.items():
        key, value = f"param/{name}", parameters[name].detach()
        if share.stop - share.start == value.numel():
            tensors[key] = (Piece(key, shards[name]), value)
        else:
            add(key, name, share.start, value.reshape(-1)[share.start : share.stop])
    for fragment in engine.fragments:
        if fragment.name not in mine:
            continue
        part = zero.partition(fragment.parameter)
        if part is not None:
            values = part.view(-1).narrow(0, 0, fragment.length)
            add(f"param/{fragment.name}", fragment.name, fragment.start, values)
        whole_here = fragment.parameter is fragment.tensor
        if whole_here and fragment.name not in own:
            continue
        moments = engine.optimizer.state.get(fragment.tensor, {})
        state = {m: moments[m] for m in MOMENTS if m in moments}
        if not whole_here:  # without ZeRO the parameter is its own master
            state["master"] = fragment.tensor.data
        for kind, value in state.items():
            start, flat = fragment.start, fragment.of(value)
            if whole_here:
                share = own[fragment.name]
                start, flat = share.start, flat[share.start : share.stop]
            add(f"optim/{fragment.name}/{kind}", fragment.name, start, flat)
    for (state_of, weight), owner in zip(
        engine.controller.weights, state_owners(engine), strict=True
    ):
        if owner == grid.replicas_of(weight).rank:
            tensors.update(_collect_sparsity(state_of, grid.tp_rank))
    if grid.dp_cp_rank == DENSE_FP8_OWNER and grid.tp_rank == 0:  # all ranks of a stage share them
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
            tensors[key] = (Piece(key, mask_shard(state, state.mask_transposable)), value)
        elif kind == "input_square" and state.shard.dim == 1:
            tensors[key] = (Piece(key, input_shard(state)), value)
        elif kind == "flips":
            tensors[key] = (Piece(key, flips_shard(state.shard)), value.reshape(1))
        elif kind == "scale" and state.experts is not None and tp_rank == 0:
            tensors[key] = (Piece(key, scale_shard(state)), value)
        elif tp_rank == 0 and state.shard.block == 0:
            tensors[key] = (Piece(key, WeightShard(tuple(value.shape))), value)
    return tensors


def moment(engine: Engine, tensor: torch.Tensor, kind: str, steps: int) -> torch.Tensor:
    """A moment of one of the optimizer's tensors, zero if it has none yet.

    Args:
        steps: that a state which begins here has made.
    """
    state = engine.optimizer.state[tensor]
    state.setdefault("step", torch.tensor(float(steps)))
    found: torch.Tensor = state.setdefault(kind, torch.zeros_like(tensor))
    return found


def _optimizer_steps(engine: Engine) -> int:
    for state in engine.optimizer.state.values():
        return int(state["step"])
    return 0
