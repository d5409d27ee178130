"""Where DeepSpeed is set up: environment and process group.

Modules of `train/` take DeepSpeed's names from here, since the environment must be set before it is
imported.
"""

from __future__ import annotations

import logging as python_logging
import os
import warnings
from collections.abc import Callable

import torch

from megasparse.distributed.rendezvous import join_group, own_device
from megasparse.distributed.rendezvous import leave_group as stop_process
from megasparse.megatron.grid import collective_timeout

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
from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec  # noqa: E402
from deepspeed.runtime.pipe import schedule  # noqa: E402
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology  # noqa: E402
from deepspeed.utils import groups as deepspeed_groups  # noqa: E402

__all__ = [
    "LayerSpec",
    "MoE",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "TiedLayerSpec",
    "deepspeed",
    "deepspeed_groups",
    "fix_order_of_sums",
    "schedule",
    "start_process",
    "stop_process",
]

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
python_logging.getLogger("DeepSpeed").setLevel(python_logging.ERROR)


def fix_order_of_sums() -> None:
    """Have torch, cuBLAS, NCCL and Transformer Engine's attention add in a fixed order on GPUs.

    Without it the backward pass of attention, among others, need not, and two runs from one seed
    part. An operation that has no such order raises. Models that are built after it have
    megatron-core's `deterministic_mode`, which is the same for the embedding. To be called before
    the process group is joined; what the environment says already stays.
    """
    for name, value in {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "^NVLS",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # Filling new memory would cost time, and nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def start_process(
    timeout_minutes: float,
    watch: Callable[[tuple[str, int] | None], object] = lambda _: None,
    waiting: Callable[[], object] = lambda: None,
    listen_everywhere: bool = False,
) -> torch.device:
    """Join the process group that the launcher described.

    Args:
        watch, waiting, listen_everywhere: as of `join_group`.

    Returns:
        The device of this rank.
    """
    device = own_device()
    join_group(device, collective_timeout(timeout_minutes), watch, waiting, listen_everywhere)
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)  # finds the group
    return device
