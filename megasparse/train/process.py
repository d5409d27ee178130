"""Where DeepSpeed is set up: environment, process group, and its configuration.

DeepSpeed's dict is derived from the RunConfig. Modules of `train/` take DeepSpeed's names
from here, since the environment must be set before it is imported.
"""

from __future__ import annotations

import logging as python_logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from megasparse.config import RunConfig, gradient_accumulation_steps
from megasparse.megatron.grid import collective_timeout
from megasparse.train.rendezvous import join_group, own_device
from megasparse.train.rendezvous import leave_group as stop_process

# Without a GPU DeepSpeed must not look for one, and the op that it would compile for shared-memory
# collectives (30 s, again whenever the environment changes) is of no use to training.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# One hardware queue, so that collectives start in the order in which they were issued and overlap
# with the GEMMs issued after them (Megatron's requirement for tensor parallelism).
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
# Megatron uses names of collectives that newer torch versions call differently.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec  # noqa: E402
from deepspeed.runtime.pipe import schedule  # noqa: E402
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology  # noqa: E402

__all__ = [
    "LayerSpec",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "TiedLayerSpec",
    "deepspeed",
    "deepspeed_config",
    "schedule",
    "start_process",
    "stop_process",
]

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
python_logging.getLogger("DeepSpeed").setLevel(python_logging.ERROR)


def start_process(
    timeout_minutes: float, watch: Callable[[tuple[str, int] | None], object] = lambda _: None
) -> torch.device:
    """Join the process group that the launcher described.

    Args:
        watch: called with where the group's store listens (`join_group`).

    Returns:
        The device of this rank.
    """
    device = own_device()
    join_group(device, collective_timeout(timeout_minutes), watch)
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)  # finds the group
    return device


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dict for a resolved configuration."""
    train, stage = config.train, config.parallel.zero_stage
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        # Norms and biases stay whole: gathering them costs more than they weigh.
        model = config.model
        longest = max(model.hidden_size, 2 * (model.ffn_hidden_size or 0))
        zero["stage3_param_persistence_threshold"] = longest + 1
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps(config, world_size),
        # Without ZeRO the engine clips (`train/engine.py`): DeepSpeed's norm leaves out unmarked
        # parameters of later stages and counts tied ones twice.
        "gradient_clipping": train.clip_grad if stage else 0.0,
        "bf16": {"enabled": train.bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Between stages whole tensors travel: with sequence parallelism those of the tensor-
        # parallel ranks differ, and DeepSpeed's partitioning takes them for equal.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
