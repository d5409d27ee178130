"""DeepSpeed's configuration: derived from the ResolvedConfig, with what a file adds to it.

`--deepspeed_config FILE` may say what megasparse does not own (buckets, profilers, communication),
and may repeat what it does; it may not contradict it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megasparse.config import ResolvedConfig, gradient_accumulation_steps
from megasparse.errors import ConfigError

# Set by flags, or of no use here.
_REFUSED = {
    "optimizer": "megasparse has its own (--lr, --weight-decay, --adam-beta1, ...)",
    "scheduler": "the learning rate follows --lr-decay-style and its flags",
    "fp16": "expected --bf16 or float32",
    "amp": "expected --bf16 or float32",
    "torch_autocast": "expected --bf16 or float32",
    "activation_checkpointing": "expected --recompute-granularity",
    "curriculum_learning": "the order of samples is a function of the seed",
    "data_efficiency": "the order of samples is a function of the seed",
    "compression_training": "expected --sparsity-recipe",
    "zero_optimization.offload_optimizer": "masked decay needs masks and gradients on one device",
    "zero_optimization.offload_param": "masks are made from weights on the device",
}


def deepspeed_config(config: ResolvedConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dict for a run.

    Raises:
        ConfigError: the file of `--deepspeed_config` cannot be read, or contradicts the run.
    """
    derived = _derived(config, world_size)
    path = config.parallel.deepspeed_config
    return derived if path is None else _merged(derived, _read(Path(path)), path, "")


def _derived(config: ResolvedConfig, world_size: int) -> dict[str, Any]:
    train, stage = config.train, config.parallel.zero_stage
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        # Norms and biases stay whole: gathering them costs more than they weigh.
        model = config.model
        longest = max(model.hidden_size, 2 * model.ffn_hidden_size)
        zero["stage3_param_persistence_threshold"] = longest + 1
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps(config, world_size),
        # Without ZeRO the engine clips (`train/engine/base.py`): DeepSpeed's norm leaves out
        # unmarked parameters of later stages and counts tied ones twice.
        "gradient_clipping": train.clip_grad if stage else 0.0,
        "bf16": {"enabled": train.bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Between stages whole tensors travel: with sequence parallelism those of the tensor-
        # parallel ranks differ, and DeepSpeed's partitioning takes them for equal.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        # It waits for the device after every micro-batch; the log has its own throughput.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


# What the derived dict only prefers, so that a file may choose otherwise.
_PREFERRED = (
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_optimization.stage3_param_persistence_threshold",
)


def _read(path: Path) -> dict[str, Any]:
    try:
        extra = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed_config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed_config {path}: no JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ConfigError(f"deepspeed_config {path}: found {type(extra).__name__}, expected {{}}")
    return extra


def _merged(
    derived: dict[str, Any], extra: dict[str, Any], path: str, prefix: str
) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        name = prefix + key
        if name in _REFUSED:
            raise ConfigError(f"deepspeed_config {path}: {name}: {_REFUSED[name]}")
        ours = derived.get(key)
        if isinstance(ours, dict) and isinstance(value, dict):
            merged[key] = _merged(ours, value, path, f"{name}.")
        elif key not in derived or name in _PREFERRED:
            merged[key] = value
        elif value not in (ours, "auto"):
            raise ConfigError(
                f"deepspeed_config {path}: {name} {value!r}, the run's flags say {ours!r}"
            )
    return merged
