"""The grid of ranks: process groups by Megatron's rules, passed around as one object.

Rank order is Megatron's: tensor innermost, then context, then data, then pipeline. DeepSpeed's is
the same, as it takes context and data parallel ranks together for data parallel ones: all of them
hold the same part of the model. Expert parallelism divides the data-parallel ranks: `ep_size` of
them, one after the other, share the experts of a layer; ranks with the same experts are
`expert_replicas`.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megasparse.megatron.context.chunks import own_chunks

T = TypeVar("T")


@dataclass(frozen=True)
class Replicas:
    """The ranks that hold the same part of some parameters, and this one among them."""

    rank: int
    size: int
    group: dist.ProcessGroup

    def from_rank(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """The values of one of them, in place."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=rank)
        return tensor


@dataclass(frozen=True)
class Grid:
    """This rank's place, and the groups that it shares with others.

    Attributes:
        rank, world: over all ranks.
        tp_rank, tp_size, tp_group: ranks that share each layer.
        cp_rank, cp_size, cp_group: ranks that share each sequence.
        dp_rank, dp_size, dp_group: ranks that train the same part of the model on other samples.
        dp_cp_rank, dp_cp_size, dp_cp_group: both of these, all that hold the same part of the
            model; context is the inner one.
        pp_rank, pp_size, pp_group: the pipeline's stages.
        model_group: tensor and pipeline together, the ranks that share one copy of the model.
        ep_rank, ep_size, ep_group: data-parallel ranks that share the experts of a layer.
        expert_replicas: those that hold the same experts.
        device: where this rank computes.
    """

    rank: int
    world: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup
    cp_rank: int
    cp_size: int
    cp_group: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup
    dp_cp_rank: int
    dp_cp_size: int
    dp_cp_group: dist.ProcessGroup
    pp_rank: int
    pp_size: int
    pp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    device: torch.device
    ep_rank: int
    ep_size: int
    ep_group: dist.ProcessGroup
    expert_replicas: Replicas

    @property
    def replicas(self) -> Replicas:
        """The ranks that hold the same of all but the experts."""
        return Replicas(self.dp_cp_rank, self.dp_cp_size, self.dp_cp_group)

    def replicas_of(self, parameter: torch.Tensor) -> Replicas:
        """The ranks that hold the same part of a parameter."""
        return self.expert_replicas if is_divided_expert(parameter) else self.replicas

    def sum_over_ep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that share the experts, in place."""
        if self.ep_size > 1:
            dist.all_reduce(tensor, group=self.ep_group)
        return tensor

    def sum_over_tp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the tensor-parallel group, in place."""
        if self.tp_size > 1:
            dist.all_reduce(tensor, group=self.tp_group)
        return tensor

    def max_over_tp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest value over the tensor-parallel group, in place."""
        if self.tp_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.tp_group)
        return tensor

    def max_over_tp_ep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest over the ranks that share the experts of a layer, in place."""
        tensor = self.max_over_tp(tensor)
        if self.ep_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.ep_group)
        return tensor

    def max_over_tp_cp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest value over the ranks that share a micro-batch's activations, in place."""
        tensor = self.max_over_tp(tensor)
        if self.cp_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.cp_group)
        return tensor

    def max_over_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest value over the ranks that compute the same layers, in place."""
        tensor = self.max_over_tp(tensor)
        if self.dp_cp_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.dp_cp_group)
        return tensor

    def sum_over_model(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that share one copy of the model, in place."""
        if self.tp_size * self.pp_size > 1:
            dist.all_reduce(tensor, group=self.model_group)
        return tensor

    def gather_over_pp(self, value: T) -> list[T]:
        """The picklable values of all stages, in order of the stages."""
        if self.pp_size == 1:
            return [value]
        values: list[Any] = [None] * self.pp_size
        dist.all_gather_object(values, value, group=self.pp_group)
        return values

    def from_first_of_tp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first tensor-parallel rank's values, in place."""
        if self.tp_size > 1:
            dist.broadcast(tensor, src=self.rank - self.tp_rank, group=self.tp_group)
        return tensor

    def sum_over_dp_cp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that hold the same part of the model, in place."""
        if self.dp_cp_size > 1:
            dist.all_reduce(tensor, group=self.dp_cp_group)
        return tensor

    def mean_over_dp_cp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks that hold the same part of the model, in place."""
        if self.dp_cp_size > 1:
            dist.all_reduce(tensor, group=self.dp_cp_group)
            tensor /= self.dp_cp_size
        return tensor

    def first_rank_first(self, build: Callable[[], T]) -> T:
        """`build()` on rank 0, then on the others (who find what it cached).

        An error on rank 0 is raised on all ranks, so that none waits for ever.
        """
        result, failure = None, None
        if self.rank == 0:
            try:
                result = build()
            except Exception as error:
                failure = error
        if self.world > 1:
            message: list[Any] = [failure]
            dist.broadcast_object_list(message, src=0)
            failure = message[0]
        if failure is not None:
            raise failure
        return build() if self.rank != 0 else result  # type: ignore[return-value]


def is_divided_expert(parameter: torch.Tensor) -> bool:
    """Whether a parameter is of experts that expert-parallel ranks share (Megatron's mark)."""
    return not getattr(parameter, "allreduce", True)


def make_grid(
    tensor_model_parallel_size: int,
    device: torch.device,
    seed: int,
    timeout_minutes: float = 10.0,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
) -> Grid:
    """Build the process groups (torch.distributed must be up) and seed dropout.

    Args:
        tensor_model_parallel_size: ranks that share each layer.
        device: of this rank.
        seed: dropout is drawn from it, differently on each rank where activations differ, equally
            where they are replicated (tensor parallelism's residuals).
        timeout_minutes: for collectives of the groups.
        pipeline_model_parallel_size: stages.
        expert_model_parallel_size: data-parallel ranks that share experts; divides their number.
        context_parallel_size: ranks that share each sequence; its product with the tensor and
            pipeline parallel sizes divides the world.
    """
    if device.type != "cuda":
        _use_cpu_in_megatron()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        context_parallel_size=context_parallel_size,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,  # nobody uses them; the control plane has its own
    )
    grid = Grid(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tensor_model_parallel_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=context_parallel_size,
        cp_group=parallel_state.get_context_parallel_group(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        dp_cp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pipeline_model_parallel_size,
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
        device=device,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=expert_model_parallel_size,
        ep_group=parallel_state.get_expert_model_parallel_group(),
        expert_replicas=Replicas(
            parallel_state.get_expert_data_parallel_rank(),
            parallel_state.get_expert_data_parallel_world_size(),
            parallel_state.get_expert_data_parallel_group(),
        ),
    )
    seed_dropout(grid, seed)
    return grid


def seed_dropout(grid: Grid, seed: int) -> None:
    """Set torch's generator and Megatron's tensor-parallel one."""
    seed += 100 * grid.dp_cp_rank + 10007 * grid.pp_rank
    if device_is_cuda := grid.device.type == "cuda":
        megatron_random.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    if device_is_cuda:
        return
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    names = (
        megatron_random.get_data_parallel_rng_tracker_name(),
        megatron_random.get_expert_parallel_rng_tracker_name(),
        "model-parallel-rng",
    )
    offsets = (0, 1024, 2718 + grid.tp_rank)
    states = {}
    for name, offset in zip(names, offsets, strict=True):
        states[name] = torch.Generator().manual_seed(seed + offset).get_state()
    tracker.set_states(states)


def rng_state(grid: Grid) -> dict[str, torch.Tensor]:
    """All generator states of this rank, uint8 tensors by name."""
    states = {
        f"tracker.{name}": state
        for name, state in megatron_random.get_cuda_rng_tracker().get_states().items()
    }
    states["cpu"] = torch.get_rng_state()
    if grid.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(grid: Grid, states: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_state` gave."""
    prefix = "tracker."
    megatron_random.get_cuda_rng_tracker().set_states(
        {
            name.removeprefix(prefix): state.cpu()
            for name, state in states.items()
            if name.startswith(prefix)
        }
    )
    torch.set_rng_state(states["cpu"].cpu())
    if grid.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu())


def collective_timeout(minutes: float) -> datetime.timedelta:
    """The limit of a collective, for `init_process_group`."""
    return datetime.timedelta(minutes=minutes)


def _use_cpu_in_megatron() -> None:
    """Let megatron-core run without CUDA: three questions to CUDA are answered by the CPU.

    It allocates on `torch.cuda.current_device()`, its RNG tracker reads and writes the CUDA
    generator, and it selects rotary positions of context parallel ranks there. Applied only where
    there is no CUDA device.
    """
    # Here the CPU's generator is the one that its tracker switches: no reason for a warning.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    # It makes a stream for its copies to the host, of which there are none here.
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = False  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    def own_positions(angles: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        return own_chunks(angles, dim, group.rank(), group.size())

    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = own_positions
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
