"""A verified checkpoint back into model, optimizer, sparsity state and generators.

Every rank reads its own share, first into host memory: an error of one is an error of all before
anything has changed. What the data-parallel ranks have alike they read in equal shares and give to
each other. In the layout that wrote the checkpoint a rank's share lies in its own file (replicated
values in that of the first tensor-parallel rank), so N ranks open about N files. In another one
the ranks read files for each other (`checkpoint/shared_reader.py`), again about N.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from megasparse.checkpoint.compatibility import check_same_layout
from megasparse.checkpoint.manifest import FORMAT, file_name
from megasparse.checkpoint.pieces import Piece, Share
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.shared_reader import Ask, SharedReader
from megasparse.checkpoint.sparsity_state import own_flips, sparsity_state
from megasparse.config import ResolvedConfig, to_dict
from megasparse.convert.optimizer_state import MOMENTS
from megasparse.convert.source import check_shape
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from megasparse.log import logger
from megasparse.megatron.grid import Replicas, rng_state, set_rng_state
from megasparse.megatron.init import parameter_shard
from megasparse.optim.fragments import Fragment
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.train.checkpoint import (
    DENSE_FP8_OWNER,
    layout,
    moment,
    parameter_shares,
    state_owners,
)
from megasparse.train.engine import zero
from megasparse.train.engine.base import Engine
from megasparse.train.shared_states import State, share_states


def load(engine: Engine, reader: CheckpointReader, control: ControlPlane) -> None:
    """Put a verified checkpoint into model, optimizer, sparsity state and generators.

    Args:
        control: of all ranks; a collective call.

    Raises:
        CheckpointError: on all ranks: it lacks something, or is of other shapes.
        ConfigError: of another layout, and dropout depends on it.
    """
    same = check_same_layout(reader, engine.config, layout(engine))
    # An older format, or another recipe, may have things elsewhere.
    settings = engine.config.checkpoint
    changed = settings.override_recipe or settings.branch_from is not None
    near = same and reader.meta["format"] == FORMAT and not changed
    rank, grid = engine.grid.rank, engine.grid
    reader.search_first([[file_name(rank), file_name(rank - grid.tp_rank)]])
    shared = SharedReader(reader, control)
    share = _Share(engine, reader, shared, near)
    together = not near or grid.pp_size > 1  # the same on all ranks
    if together:
        shared.look_up(share.asks())
    control.on_all_ranks(lambda: share.read(same))
    if together:
        shared.fetch()
    share.leave_out({key for keys in control.gather(share.absent) for key in keys})
    reader.close()
    share.put()
    engine.controller.clock.step = reader.meta["step"]
    engine.controller.clock.samples = reader.meta["consumed_samples"]
    if not same:
        logger.warning("the checkpoint was written by another layout (%s)", reader.meta["layout"])


@dataclass
class _Values:
    """What was read of one tensor that the data-parallel ranks may have alike."""

    part: torch.Tensor
    shares: list[Share] | None  # None: this rank's alone


class _Share:
    """What one rank reads, and where it goes.

    Args:
        reader: for what is in this rank's own files.
        shared: for all else.
        near: this layout wrote the checkpoint, so that nearly all is in the own files.

    Attributes:
        absent: keys of moments that are not stored.
    """

    def __init__(
        self, engine: Engine, reader: CheckpointReader, shared: SharedReader, near: bool
    ) -> None:
        self._engine, self._reader, self._grid = engine, reader, engine.grid
        self._shared, self._near = shared, near
        self._shares = parameter_shares(engine)
        self._dense = [dense for dense, _ in engine.controller.dense]
        self._owners = [*state_owners(engine), *(DENSE_FP8_OWNER for _ in self._dense)]
        named = engine.model.named_parameters()
        self._copies = {name for name, parameter in named if zero.is_copy(parameter)}
        self._parameters: dict[str, _Values] = {}
        self._optimizer: list[tuple[Fragment, str, str, _Values]] = []
        self._states: dict[int, State] = {}
        self._generators: State = {}
        self.absent: list[str] = []

    def read(self, same_layout: bool) -> None:
        """All of it, into host memory."""
        for name, parameter in self._engine.model.named_parameters():
            wanted, shares = self._of_parameter(name, parameter)
            self._parameters[name] = self._read(f"param/{name}", name, wanted, shares)
        for fragment in self._engine.fragments:
            self._read_fragment(fragment)
        for number, owner in enumerate(self._owners):
            if owner == self._replicas(number).rank:
                self._states[number] = self._read_state(number)
        if same_layout:
            self._generators = self._read_generators()

    def asks(self) -> dict[str, Ask]:
        """What `read` will want, for `SharedReader.look_up`."""
        asks: dict[str, Ask] = {}
        for name, parameter in self._engine.model.named_parameters():
            if self._of(name) is self._shared:
                asks.setdefault(name, Ask()).parts.append(self._of_parameter(name, parameter)[0])
        for fragment in self._engine.fragments:
            if fragment.name in asks:
                asks[fragment.name].parts.append(self._of_fragment(fragment)[0])
        for number, owner in enumerate(self._owners):
            if owner == self._replicas(number).rank and not self._near:
                asks.setdefault(self._state_name(number), Ask()).all = True
        return asks

    def _of(self, name: str) -> CheckpointReader | SharedReader:
        """Where a parameter is read: a copy (tied embeddings) is written by another stage."""
        return self._reader if self._near and name not in self._copies else self._shared

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
                parameter.copy_(self._whole(values, parameter, parameter).view(parameter.shape))
        for fragment, kind, _, values in self._optimizer:
            target = fragment.of(self._target(fragment, kind))
            whole = values.part
            if values.shares is not None:
                whole = self._whole(values, target, fragment.parameter)
            target.copy_(whole)
        self._put_states()
        if self._generators:
            set_rng_state(self._grid, self._generators)

    def _of_parameter(
        self, name: str, parameter: torch.nn.Parameter
    ) -> tuple[Piece, list[Share] | None]:
        """What this rank reads of a parameter; and the shares of the data-parallel ranks, if these
        have it alike."""
        shard = parameter_shard(parameter, self._grid.tp_rank, self._grid.tp_size)
        part = zero.partition(parameter)
        if part is None:
            return self._own_share(shard, self._shares[name], parameter), self._shares[name]
        numel = math.prod(shard.local_shape)
        start = min(self._grid.dp_cp_rank * part.numel(), numel)
        return Piece("", shard, start, min(start + part.numel(), numel)), None

    def _of_fragment(self, fragment: Fragment) -> tuple[Piece, list[Share] | None]:
        """The same of the optimizer's tensors."""
        shard = parameter_shard(fragment.parameter, self._grid.tp_rank, self._grid.tp_size)
        if fragment.parameter is fragment.tensor:
            shares = self._shares[fragment.name]
            return self._own_share(shard, shares, fragment.parameter), shares
        return Piece("", shard, fragment.start, fragment.start + fragment.length), None

    def _own_share(self, shard: WeightShard, shares: list[Share], parameter: torch.Tensor) -> Piece:
        rank = self._grid.replicas_of(parameter).rank
        mine = [(s.start, s.stop) for s in shares if s.rank == rank]
        return Piece("", shard, *(mine[0] if mine else (0, 0)))

    def _read(
        self, key: str, name: str, part: Piece, shares: list[Share] | None, needed: bool = True
    ) -> _Values:
        """A piece of a tensor that is cut like the parameter `name`.

        Args:
            shares: of the data-parallel ranks, if they have it alike.
            needed: its absence is an error, else it is noted.
        """
        if not part.numel:
            return _Values(torch.empty(0), shares)
        reader = self._of(name)
        if not needed and not reader.is_likely(key):
            self.absent.append(key)
            return _Values(torch.empty(0), shares)
        check_shape(reader.shape(key), part.shard, name, str(reader.folder))
        return _Values(reader.read_part(dataclasses.replace(part, key=key)), shares)

    def _read_fragment(self, fragment: Fragment) -> None:
        """Master and moments of a piece of a parameter, as far as they are stored."""
        base, steps = f"optim/{fragment.name}", self._reader.meta["optimizer_steps"]
        keys = {kind: f"{base}/{kind}" for kind in MOMENTS if steps}
        if self._reader.meta["layout"].get("zero"):
            keys["master"] = f"{base}/master"
        elif fragment.parameter is not fragment.tensor:  # without ZeRO it is its own master
            keys["master"] = f"param/{fragment.name}"
        part, shares = self._of_fragment(fragment)
        for kind, key in keys.items():
            values = self._read(key, fragment.name, part, shares, needed=kind == "master")
            self._optimizer.append((fragment, kind, key, values))

    def _target(self, fragment: Fragment, kind: str) -> torch.Tensor:
        if kind == "master":
            return fragment.tensor.data
        return moment(self._engine, fragment.tensor, kind, self._reader.meta["optimizer_steps"])

    def _whole(self, values: _Values, like: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """1-D, put together from the shares of the ranks that hold the same."""
        replicas = self._grid.replicas_of(parameter)
        whole = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        for share in values.shares or ():
            part = whole[share.start : share.stop]
            if share.rank == replicas.rank:
                part.copy_(values.part)
            replicas.from_rank(part, share.rank)
        return whole

    def _read_state(self, number: int) -> State:
        """Of a sparse weight, or after those of a dense one in FP8."""
        weights = self._engine.controller.weights
        reader = self._reader if self._near else self._shared
        if number >= len(weights):
            return _fp8_state(reader, self._dense[number - len(weights)].name)
        state = weights[number][0]
        if _has_state(reader, state, self._engine.config):
            return sparsity_state(reader, state)
        # The run has another recipe: masks begin with the next step.
        return {} if state.quantizers is None else _fp8_state(reader, state.name)

    def _replicas(self, number: int) -> Replicas:
        """The ranks that have the same state, of a sparse weight or after those of a dense one."""
        weights = self._engine.controller.weights
        if number >= len(weights):
            return self._grid.replicas
        return self._grid.replicas_of(weights[number][1])

    def _state_name(self, number: int) -> str:
        weights = self._engine.controller.weights
        if number >= len(weights):
            return self._dense[number - len(weights)].name
        return weights[number][0].name

    def _put_states(self) -> None:
        weights = self._engine.controller.weights
        for number in self._states:
            if number < len(weights):
                shard = weights[number][0].shard
                self._states[number] = own_flips(self._states[number], shard)
        found: dict[int, State] = {}
        for replicas in {
            r.group: r for r in map(self._replicas, range(len(self._owners)))
        }.values():
            theirs = {
                number: owner
                for number, owner in enumerate(self._owners)
                if self._replicas(number).group is replicas.group
            }
            read = {n: state for n, state in self._states.items() if n in theirs}
            for owner in sorted(set(theirs.values())):
                found |= share_states(replicas, self._grid.device, owner, read)
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


def _fp8_state(reader: CheckpointReader | SharedReader, name: str) -> State:
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


def _has_state(
    reader: CheckpointReader | SharedReader, state: SparseWeight, config: ResolvedConfig
) -> bool:
    """Whether the saved state of a weight is to be taken over."""
    settings = config.checkpoint
    if not settings.override_recipe and settings.branch_from is None:
        return True  # if it is missing, reading it is an error
    before, now = reader.meta["config"]["sparsity"], to_dict(config)["sparsity"]
    same = before["sparsity_recipe"] == now["sparsity_recipe"]
    # A branch keeps its position, masks too, which a phase of another kind replaces; Wanda's norms
    # are to be there if they are wanted.
    norms = state.inputs is None or f"sparsity/{state.name}/input_square" in reader
    kept = same or (settings.branch_from is not None and norms)
    return kept and f"sparsity/{state.name}/counters" in reader
