"""DeepSpeed's JSON as a source of settings: what it says and no flag does is taken over.

The order is defaults < JSON < YAML files < flags, but the JSON may not contradict a file or a flag.
`"auto"` stands for the run's own value. All that is wrong is told at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from megasparse.config.deepspeed.keys import FIELDS_OF, MISSING, NOTHING, PASSED_ON, READ
from megasparse.config.fields import FIELDS, convert
from megasparse.config.resolved import ResolvedConfig, data_parallel_size
from megasparse.config.schema import RunConfig
from megasparse.errors import ConfigError
from megasparse.input_files import read_regular

AUTO = "auto"
_ADAM = ("adam", "adamw", "fusedadam", "cpuadam")
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_NOTHING = {key: why for why, keys in NOTHING.items() for key in keys.split()}
_MISSING = {key: why for why, keys in MISSING.items() for key in keys.split()}
_PASSED_ON = PASSED_ON.split()
_KNOWN = [*FIELDS_OF, *READ.split(), *_PASSED_ON, *_NOTHING, *_MISSING]
# Values with which a key that is missing asks for nothing.
_OFF: tuple[Any, ...] = (False, None, AUTO, 0, {}, "none")


def read_json(path: Path) -> dict[str, Any]:
    """The file's settings.

    Raises:
        ConfigError: it cannot be read or is no JSON object.
    """
    try:
        tree = json.loads(read_regular(path))
    except OSError as error:
        raise ConfigError(f"deepspeed_config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed_config {path}: no JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"deepspeed_config {path}: found {type(tree).__name__}, expected {{}}")
    return tree


def take_over(
    config: RunConfig, given: Collection[str], world_size: int | None
) -> tuple[list[str], list[str]]:
    """Set what the JSON of `--deepspeed_config` says and neither flags nor YAML files do.

    Args:
        config: changed in place.
        given: fields that flags and YAML files set.
        world_size: ranks of the run; None: not known, so micro-batches of a step say nothing.

    Returns:
        Notes of what was taken over, and problems.
    """
    if config.parallel.deepspeed_config is None:
        return [], []
    path = config.parallel.deepspeed_config
    notes, problems = [], []
    try:
        tree = read_json(Path(path))
    except ConfigError as error:
        return [], [str(error)]
    where = f"deepspeed_config {path}: "
    problems += [where + problem for problem in _unknown(tree)]
    for key, name, value in _settings(tree, config, world_size):
        if name in given:
            continue
        try:
            value = convert(FIELDS[name], value, f"{where}{key}")
        except ConfigError as error:
            problems.append(str(error))
            continue
        group = getattr(config, FIELDS[name].group)
        if getattr(group, name) != value:
            setattr(group, name, value)
            notes.append(f"{FIELDS[name].flag} {value} (deepspeed_config: {key})")
    idle = [key for key, value in _leaves(tree) if _rule(key) in _NOTHING and value not in _OFF]
    if idle:
        notes.append(f"nothing to do for {', '.join(idle)} of deepspeed_config")
    return notes, problems


def contradictions(tree: dict[str, Any], config: ResolvedConfig, world_size: int) -> list[str]:
    """What a JSON says otherwise than the run, and what is not known or missing."""
    problems = _unknown(tree)
    for key, name, value in _settings(tree, config, world_size):
        ours = getattr(getattr(config, FIELDS[name].group), name)
        both_zero_one = name == "zero_stage" and value == 0 and config.train.bf16
        if value != ours and not both_zero_one:
            problems.append(f"{key} {value!r}, but {FIELDS[name].flag} is {ours!r}")
    return problems


def passed_on(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What of a JSON DeepSpeed itself is to read."""
    kept = {}
    for key, value in tree.items():
        rule = _rule(prefix + key)
        if rule in _PASSED_ON:
            kept[key] = value
        elif rule is None and isinstance(value, dict):
            inner = passed_on(value, f"{prefix}{key}.")
            kept |= {key: inner} if inner else {}
    return kept


def _settings(
    tree: dict[str, Any], config: RunConfig, world_size: int | None
) -> Iterator[tuple[str, str, Any]]:
    """Key, field and value of everything that is a setting of the run."""
    leaves = dict(_leaves(tree))
    for key, name in FIELDS_OF.items():
        value = leaves.get(key, AUTO)
        if value in (AUTO, None) or (key == "fp16.enabled" and value is False):
            continue
        yield key, name, value
    steps = leaves.get("gradient_accumulation_steps", AUTO)
    if isinstance(steps, int) and world_size is not None:
        micro = leaves.get("train_micro_batch_size_per_gpu", AUTO)
        micro = config.train.micro_batch_size if micro == AUTO else micro
        if isinstance(micro, int):
            batch = micro * steps * data_parallel_size(config, world_size)
            yield "gradient_accumulation_steps", "global_batch_size", batch
    betas = leaves.get("optimizer.params.betas", AUTO)
    if isinstance(betas, list) and len(betas) == 2:
        for number, value in enumerate(betas, 1):
            yield "optimizer.params.betas", f"adam_beta{number}", value
    dtype = leaves.get("data_types.grad_accum_dtype", AUTO)
    if dtype in ("fp32", "bf16", "fp16"):
        field = "accumulate_allreduce_grads_in_fp32"
        yield "data_types.grad_accum_dtype", field, dtype == "fp32"
    yield from _schedule(leaves)
    yield from _recomputation(leaves, config)


def _schedule(leaves: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    kind = leaves.get("scheduler.type")
    if kind not in _SCHEDULES:
        return
    params = leaves.get("scheduler.params", {})
    yield "scheduler.type", "lr_decay_style", _SCHEDULES[kind]
    for key, name in (
        ("warmup_max_lr", "lr"),
        ("warmup_num_steps", "lr_warmup_iters"),
        ("total_num_steps", "lr_decay_iters"),
    ):
        if params.get(key, AUTO) != AUTO:
            yield f"scheduler.params.{key}", name, params[key]
    rate = leaves.get("optimizer.params.lr", AUTO)
    if kind == "WarmupCosineLR" and isinstance(rate, (int, float)):
        floor = params.get("cos_min_ratio", 0.0001)
        if isinstance(floor, (int, float)):
            yield "scheduler.params.cos_min_ratio", "min_lr", floor * rate


def _recomputation(leaves: dict[str, Any], config: RunConfig) -> Iterator[tuple[str, str, Any]]:
    section = "activation_checkpointing."
    count = leaves.get(section + "number_checkpoints")
    if isinstance(count, int) and count > 0:
        key = section + "number_checkpoints"
        yield key, "recompute_granularity", "full"
        yield key, "recompute_num_layers", -(-config.model.num_layers // count)
        return
    for key in ("partition_activations", "contiguous_memory_optimization"):
        if leaves.get(section + key) is True:
            yield section + key, "recompute_granularity", "full"
            return


def _unknown(tree: dict[str, Any]) -> list[str]:
    """Keys that DeepSpeed does not have, and those that ask for what is not here."""
    problems = []
    for key, value in _leaves(tree):
        rule = _rule(key)
        if rule is None and any(known.startswith(f"{key}.") for known in _KNOWN):
            problems.append(f"{key} {value!r}, expected settings in {{}}")
        elif rule is None:
            near = difflib.get_close_matches(key, _names(), n=1, cutoff=0.6)
            hint = f", did you mean {near[0]}?" if near else ""
            problems.append(f"{key} is no setting of DeepSpeed{hint}")
        elif rule in _MISSING and not _is_off(value):
            problems.append(f"{key} is not supported: {_MISSING[rule]}")
    return [*problems, *_misfits(dict(_leaves(tree)))]


def _misfits(leaves: dict[str, Any]) -> Iterator[str]:
    """What has an equivalent in part alone."""
    kind = leaves.get("optimizer.type", "AdamW")
    if str(kind).lower() not in _ADAM:
        yield f"optimizer.type {kind!r}, expected AdamW: megasparse has its own, with masked decay"
    if leaves.get("optimizer.params.adam_w_mode") is False:
        yield "optimizer.params.adam_w_mode false, expected true: weight decay is decoupled"
    betas = leaves.get("optimizer.params.betas", AUTO)
    if betas != AUTO and not (isinstance(betas, list) and len(betas) == 2):
        yield f"optimizer.params.betas {betas!r}, expected two numbers"
    dtype = leaves.get("data_types.grad_accum_dtype")
    if dtype not in (None, AUTO, "fp32", "bf16", "fp16"):
        yield f"data_types.grad_accum_dtype {dtype!r}, expected fp32 or bf16"
    kind, params = leaves.get("scheduler.type"), leaves.get("scheduler.params", {})
    if kind is not None and kind not in _SCHEDULES:
        yield f"scheduler.type {kind!r}, expected one of {', '.join(_SCHEDULES)}"
    elif kind is not None:
        if params.get("warmup_type", "log") not in ("linear", AUTO):
            yield 'scheduler.params.warmup_type is log, expected "linear", as warm-up is here'
        for key in ("warmup_min_lr", "warmup_min_ratio"):
            if params.get(key, 0) not in (0, 0.0, AUTO):
                yield f"scheduler.params.{key} {params[key]!r}, expected 0, where warm-up starts"


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        asked = value.get("enabled", value.get("device", True))
        return not value or asked in _OFF
    return value in _OFF or (value == 1 and value is not True)  # a partition of one rank


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value; sections that are known as a whole are one."""
    for key, value in tree.items():
        name = prefix + key
        if isinstance(value, dict) and value and f"{name}.*" not in _KNOWN:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _rule(key: str) -> str | None:
    """The entry of the table for a key."""
    return next((rule for rule in (key, f"{key}.*") if rule in _KNOWN), None)


def _names() -> list[str]:
    return [name.removesuffix(".*") for name in _KNOWN]
