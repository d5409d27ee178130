"""A verified checkpoint back into model, optimizer, sparsity state and generators.

Every rank reads its own share alone, first into host memory: an error of one is an error of all
before anything has changed. What the data-parallel ranks have alike they read in equal shares and
give to each other. In the layout that wrote the checkpoint a rank's share lies in its own file
(replicated values in that of the first tensor-parallel rank), so N ranks open about N files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from megasparse.checkpoint.compatibility import check_same_layout
from megasparse.checkpoint.manifest import file_name
from megasparse.checkpoint.model import check_shape, sparsity_state
from megasparse.checkpoint.pieces import Piece, Share
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.config import ResolvedConfig, to_dict
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from megasparse.log import logger
from megasparse.megatron.grid import Grid, rng_state, set_rng_state
from megasparse.megatron.init import parameter_shard
from megasparse.optim.fragments import Fragment
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.tensor_files import raw_bytes
from megasparse.train.checkpoint import (
    DENSE_FP8_OWNER,
    MOMENTS,
    layout,
    parameter_shares,
    state_owners,
)
from megasparse.train.engine import zero
from megasparse.train.engine.base import Engine

State = dict[str, torch.Tensor]


def load(engine: Engine, reader: CheckpointReader, control: ControlPlane) -> None:
    """Put a verified checkpoint into model, optimizer, sparsity state and generators.

    Args:
        control: of all ranks; a collective call.

    Raises:
        CheckpointError: on all ranks: it lacks something, or is of other shapes.
        ConfigError: of another layout, and dropout depends on it.
    """
    same = check_same_layout(reader, engine.config, layout(engine))
    reader.search_first(likely_files(reader.meta["layout"], engine.grid, same))
    share = _Share(engine, reader)
    control.on_all_ranks(lambda: share.read(same))
    share.leave_out({key for keys in control.gather(share.absent) for key in keys})
    reader.close()
    share.put()
    engine.controller.clock.step = reader.meta["step"]
    engine.controller.clock.samples = reader.meta["consumed_samples"]
    if not same:
        logger.warning("the checkpoint was written by another layout (%s)", reader.meta["layout"])


def likely_files(saved: dict[str, Any], grid: Grid, same: bool) -> list[list[str]]:
    """Files in which a rank's state probably is, the most probable first.

    Ranks are numbered with tensor parallelism innermost, then data, then pipeline.

    Args:
        saved: layout that wrote the checkpoint.
        same: whether this run has the same.
    """
    sizes = [saved.get(name) for name in ("tp", "dp", "pp")]
    tp, dp, pp = (size if type(size) is int else 0 for size in sizes)
    if not (tp > 0 and dp > 0 and pp > 0):
        return []
    parts = sorted({grid.tp_rank, 0}) if tp == grid.tp_size else list(range(tp))

    def files_of(stages: list[int]) -> list[str]:
        return [
            file_name((stage * dp + copy) * tp + part)
            for stage in stages
            for copy in range(dp)
            for part in parts
        ]

    begin, end = grid.pp_rank * pp, (grid.pp_rank + 1) * pp  # in units of 1 / (pp * grid.pp_size)
    stages = [s for s in range(pp) if s * grid.pp_size < end and (s + 1) * grid.pp_size > begin]
    own = [file_name(grid.rank), file_name(grid.rank - grid.tp_rank)] if same else []
    return [own, files_of(stages), files_of([0])]  # tied embeddings are the first stage's


@dataclass
class _Values:
    """What was read of one tensor that the data-parallel ranks may have alike."""

    part: torch.Tensor
    shares: list[Share] | None  # None: this rank's alone


class _Share:
    """What one rank reads, and where it goes.

    Attributes:
        absent: keys of moments that are not stored.
    """

    def __init__(self, engine: Engine, reader: CheckpointReader) -> None:
        self._engine, self._reader, self._grid = engine, reader, engine.grid
        self._shares = parameter_shares(engine)
        self._dense = [dense for dense, _ in engine.controller.dense]
        self._owners = [*state_owners(engine), *(DENSE_FP8_OWNER for _ in self._dense)]
        self._parameters: dict[str, _Values] = {}
        self._optimizer: list[tuple[Fragment, str, str, _Values]] = []
        self._states: dict[int, State] = {}
        self._generators: State = {}
        self.absent: list[str] = []

    def read(self, same_layout: bool) -> None:
        """All of it, into host memory."""
        for name, parameter in self._engine.model.named_parameters():
            shard = parameter_shard(parameter, self._grid.tp_rank, self._grid.tp_size)
            key, part = f"param/{name}", zero.partition(parameter)
            if part is None:
                self._parameters[name] = self._read(key, name, shard, self._shares[name])
                continue
            numel = math.prod(shard.local_shape)
            start = min(self._grid.dp_rank * part.numel(), numel)
            stop = min(start + part.numel(), numel)
            self._parameters[name] = self._read(key, name, shard, None, start, stop)
        for fragment in self._engine.fragments:
            self._read_fragment(fragment)
        for number, owner in enumerate(self._owners):
            if owner == self._grid.dp_rank:
                self._states[number] = self._read_state(number)
        if same_layout:
            self._generators = self._read_generators()

    def leave_out(self, absent: set[str]) -> None:
        """Forget moments that some rank has not found: of parameters that never had a gradient."""
        self._optimizer = [entry for entry in self._optimizer if entry[2] not in absent]

    def put(self) -> None:
        """Into the engine; all ranks together."""
        for name, parameter in self._engine.model.named_parameters():
            values = self._parameters.pop(name)
            if values.shares is None:
                zero.put_partition(parameter, values.part)
                continue
            with torch.no_grad():
                parameter.copy_(self._whole(values, parameter).view(parameter.shape))
        for fragment, kind, _, values in self._optimizer:
            target = fragment.of(self._target(fragment, kind))
            whole = self._whole(values, target) if values.shares is not None else values.part
            target.copy_(whole)
        self._put_states()
        if self._generators:
            set_rng_state(self._grid, self._generators)

    def _read(
        self,
        key: str,
        name: str,
        shard: WeightShard,
        shares: list[Share] | None,
        start: int = 0,
        stop: int = 0,
        needed: bool = True,
    ) -> _Values:
        """The range that this rank reads of a tensor that is cut like the parameter `name`.

        Args:
            shares: of the data-parallel ranks, which say the range; None: start and stop do.
            needed: its absence is an error, else it is noted.
        """
        if shares is not None:
            mine = [(s.start, s.stop) for s in shares if s.rank == self._grid.dp_rank]
            start, stop = mine[0] if mine else (0, 0)
        if start == stop:
            return _Values(torch.empty(0), shares)
        if not needed and key not in self._reader:
            self.absent.append(key)
            return _Values(torch.empty(0), shares)
        check_shape(self._reader.shape(key), shard, name, str(self._reader.folder))
        return _Values(self._reader.read_part(Piece(key, shard, start, stop)), shares)

    def _read_fragment(self, fragment: Fragment) -> None:
        """Master and moments of a piece of a parameter, as far as they are stored."""
        base, steps = f"optim/{fragment.name}", self._reader.meta["optimizer_steps"]
        whole_here = fragment.parameter is fragment.tensor
        keys = {kind: f"{base}/{kind}" for kind in MOMENTS if steps}
        if self._reader.meta["layout"].get("zero"):
            keys["master"] = f"{base}/master"
        elif not whole_here:  # without ZeRO the parameter is its own master
            keys["master"] = f"param/{fragment.name}"
        shares = self._shares[fragment.name] if whole_here else None
        shard = parameter_shard(fragment.parameter, self._grid.tp_rank, self._grid.tp_size)
        start, stop = fragment.start, fragment.start + fragment.length
        for kind, key in keys.items():
            values = self._read(
                key, fragment.name, shard, shares, start, stop, needed=kind == "master"
            )
            self._optimizer.append((fragment, kind, key, values))

    def _target(self, fragment: Fragment, kind: str) -> torch.Tensor:
        if kind == "master":
            return fragment.tensor.data
        state = self._engine.optimizer.state[fragment.tensor]
        state.setdefault("step", torch.tensor(float(self._reader.meta["optimizer_steps"])))
        moment: torch.Tensor = state.setdefault(kind, torch.zeros_like(fragment.tensor))
        return moment

    def _whole(self, values: _Values, like: torch.Tensor) -> torch.Tensor:
        """1-D, put together from the shares of the data-parallel ranks."""
        whole = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        for share in values.shares or ():
            part = whole[share.start : share.stop]
            if share.rank == self._grid.dp_rank:
                part.copy_(values.part)
            self._grid.from_dp_rank(part, share.rank)
        return whole

    def _read_state(self, number: int) -> State:
        """Of a sparse weight, or after those of a dense one in FP8."""
        weights = self._engine.controller.weights
        if number >= len(weights):
            return _fp8_state(self._reader, self._dense[number - len(weights)].name)
        state = weights[number][0]
        if _has_state(self._reader, state, self._engine.config):
            return sparsity_state(self._reader, state)
        # The run has another recipe: masks begin with the next step.
        return {} if state.quantizers is None else _fp8_state(self._reader, state.name)

    def _put_states(self) -> None:
        weights = self._engine.controller.weights
        found: dict[int, State] = {}
        for owner in sorted(set(self._owners)):
            found |= share_states(self._grid, owner, self._states)
        for number in range(len(self._owners)):
            loaded = found.get(number, {})
            if number >= len(weights):
                self._dense[number - len(weights)].import_state(loaded)
                continue
            state, weight = weights[number]
            if "counters" in loaded:
                state.import_state(loaded, weight.device)
            elif state.quantizers is not None:
                state.quantizers.import_state(loaded)

    def _read_generators(self) -> State:
        prefix, expected = f"rng/{self._grid.rank}/", sorted(rng_state(self._grid))
        keys = self._reader.keys_beside(f"{prefix}{expected[0]}", prefix)
        if sorted(key.removeprefix(prefix) for key in keys) != expected:
            raise CheckpointError(f"{self._reader.folder}: generators {keys}, expected {expected}")
        return {key.removeprefix(prefix): self._reader.read(key) for key in keys}


def share_states(grid: Grid, owner: int, states: dict[int, State]) -> dict[int, State]:
    """The states that one data-parallel rank has read, on all of them, on the CPU."""
    if grid.dp_size == 1:
        return states
    head, content = b"", torch.empty(0, dtype=torch.uint8)
    if grid.dp_rank == owner:
        flat = {(n, k): v for n, state in states.items() for k, v in state.items()}
        record = [[*key, str(v.dtype).split(".")[1], list(v.shape)] for key, v in flat.items()]
        head = json.dumps(record).encode()
        content = torch.frombuffer(
            bytearray(head + b"".join(raw_bytes(v) for v in flat.values())), dtype=torch.uint8
        )
    sizes = torch.tensor([len(head), content.numel()], device=grid.device)
    grid.from_dp_rank(sizes, owner)
    length, total = sizes.tolist()
    room = torch.empty(total, dtype=torch.uint8, device=grid.device)
    if grid.dp_rank == owner:
        room.copy_(content)
    content = grid.from_dp_rank(room, owner).cpu()
    found: dict[int, State] = {}
    place = length
    for number, kind, name, shape in json.loads(content[:length].numpy().tobytes()):
        dtype = getattr(torch, name)
        end = place + torch.Size(shape).numel() * dtype.itemsize
        values = content[place:end].clone().view(dtype).view(shape)
        found.setdefault(number, {})[kind] = values
        place = end
    return found


def _fp8_state(reader: CheckpointReader, name: str) -> State:
    """Delayed FP8 scales of a weight's operands, stored by a sparse or by a dense layer; empty if
    the run before was not in FP8, or was not for this layer."""
    saved = reader.meta["config"].get("fp8", {})
    if saved.get("fp8_format") is None or saved.get("fp8_recipe") == "tensorwise":
        return {}
    for place in (f"fp8/{name}/", f"sparsity/{name}/"):
        if (key := f"{place}fp8_scale") in reader:
            found = reader.keys_beside(key, f"{place}fp8_")
            return {other.removeprefix(place): reader.read(other) for other in found}
    return {}


def _has_state(reader: CheckpointReader, state: SparseWeight, config: ResolvedConfig) -> bool:
    """Whether the saved state of a weight is to be taken over."""
    if not config.checkpoint.override_recipe:
        return True  # if it is missing, reading it is an error
    before, now = reader.meta["config"]["sparsity"], to_dict(config)["sparsity"]
    same = before["sparsity_recipe"] == now["sparsity_recipe"]
    return same and f"sparsity/{state.name}/counters" in reader
