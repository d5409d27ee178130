"""DeepSpeed's configuration: derived from the ResolvedConfig, with what a file adds to it.

`--deepspeed_config FILE` may say what megasparse does not own (buckets, profilers, communication),
and may repeat what it does; it may not contradict it (`json_file.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasparse.config import ResolvedConfig, gradient_accumulation_steps
from megasparse.config.deepspeed.json_file import contradictions, passed_on, read_json
from megasparse.errors import together


def deepspeed_config(config: ResolvedConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dict for a run.

    Raises:
        ConfigError: the file of `--deepspeed_config` cannot be read, or contradicts the run.
    """
    derived = _derived(config, world_size)
    path = config.parallel.deepspeed_config
    if path is None:
        return derived
    tree = read_json(Path(path))
    if problems := contradictions(tree, config, world_size):
        raise together([f"deepspeed_config {path}: {problem}" for problem in problems])
    return _merged(derived, passed_on(tree))


def _derived(config: ResolvedConfig, world_size: int) -> dict[str, Any]:
    train, stage = config.train, config.parallel.zero_stage
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        # Norms and biases stay whole: gathering them costs more than they weigh.
        model = config.model
        longest = max(model.hidden_size, 2 * model.ffn_hidden_size)
        zero["stage3_param_persistence_threshold"] = longest + 1
    derived: dict[str, Any] = {
        # To DeepSpeed context parallel ranks are data parallel ones, with sequences of their own.
        "train_batch_size": train.global_batch_size * config.parallel.context_parallel_size,
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
    if stage >= 2 and train.bf16:
        # ZeRO 0 and 1 add up in `train/engine/gradients.py`.
        full = config.parallel.accumulate_allreduce_grads_in_fp32
        derived["communication_data_type"] = "fp32" if full else "bf16"
        derived["data_types"] = {"grad_accum_dtype": "fp32" if full else "bf16"}
    return derived


def _merged(derived: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """The derived settings with those of a file, section by section."""
    merged = dict(derived)
    for key, value in extra.items():
        ours = derived.get(key)
        both = isinstance(ours, dict) and isinstance(value, dict)
        merged[key] = _merged(ours, value) if both else value  # type: ignore[arg-type]
    return merged
