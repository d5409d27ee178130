"""Megatron's process groups as DeepSpeed asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron.core import parallel_state

T = TypeVar("T")


def _with_context(ask: Callable[..., T]) -> Callable[[], T]:
    """A question about data parallel ranks, with context parallel ones among them."""
    return lambda: ask(with_context_parallel=True)


class ModelParallelUnit:
    """What DeepSpeed asks about process groups (its `mpu`), answered by Megatron.

    Its data parallel ranks are all that hold the same part of the model, over which it divides
    state and averages gradients: context parallel ranks are among them.
    """

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_data_parallel_rank = staticmethod(_with_context(parallel_state.get_data_parallel_rank))
    get_data_parallel_world_size = staticmethod(
        _with_context(parallel_state.get_data_parallel_world_size)
    )
    get_data_parallel_group = staticmethod(_with_context(parallel_state.get_data_parallel_group))
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(
        parallel_state.get_pipeline_model_parallel_world_size
    )
    get_pipeline_model_parallel_group = staticmethod(
        parallel_state.get_pipeline_model_parallel_group
    )
