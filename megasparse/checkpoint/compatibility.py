"""Whether a checkpoint is of this run: what may not change silently, and the flag that allows it.

Layout, micro-batch, workers and intervals may change freely. Each of the rest has an override.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megasparse.checkpoint.reader import CheckpointReader
from megasparse.config import ResolvedConfig
from megasparse.errors import ConfigError
from megasparse.log import logger

# Override flag -> (group, fields); None: all fields of the group that no other flag has.
GUARDED: tuple[tuple[str, str, tuple[str, ...] | None], ...] = (
    ("override_batch", "train", ("global_batch_size", "rampup_batch_size")),
    ("override_seed", "train", ("seed",)),
    ("override_precision", "train", ("bf16",)),
    ("override_precision", "fp8", (
        "fp8_format", "fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo",
    )),
    ("override_schedule", "train", (
        "train_iters", "lr", "min_lr", "decoupled_lr", "decoupled_min_lr",
        "lr_decay_style", "lr_decay_iters", "lr_warmup_iters",
        "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_linear_to_zero_iters",
        "train_samples", "lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples",
        "lr_linear_to_zero_samples",
        "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad",
    )),
    ("override_seq_length", "model", ("seq_length", "max_position_embeddings")),
    ("override_model", "model", None),
    ("override_recipe", "sparsity", None),
    ("override_distillation", "distillation", (
        "kd_loss_weight", "lm_loss_weight", "kd_temperature", "teacher_dtype",
    )),
    ("override_tokenizer", "data", ("eod_token", "bos_token", "add_bos", "parse_special")),
    ("override_data", "bert", ("mask_prob", "short_seq_prob")),
    ("override_tokenizer", "bert", ("cls_token", "sep_token", "mask_token")),
    ("override_data", "data", (
        "split", "mock_data", "reset_position_ids", "reset_attention_mask", "eod_mask_loss",
        "sft",
    )),
)  # fmt: skip


def check_same_run(
    reader: CheckpointReader, config: ResolvedConfig, digests: dict[str, str]
) -> None:
    """Refuse to continue a run with other sizes, data, schedule or recipe.

    What a flag allows is told, the settings of a flag in one line.

    Args:
        digests: of data (by split and prefix) and tokenizer.

    Raises:
        ConfigError: names field, saved and given value, and the flag that allows the change.
    """
    saved = reader.meta["config"]
    if reader.imported:
        return  # weights alone, for a run of any kind: `convert.source.check_model` compares sizes
    taken = {name for _, _, names in GUARDED for name in names or ()}
    changes: dict[str, list[str]] = {}
    for flag, group, names in GUARDED:
        section = getattr(config, group)
        for field in dataclasses.fields(section):
            if field.name not in names if names is not None else field.name in taken:
                continue
            if field.name == "train_iters" and config.train.train_samples is not None:
                continue  # they follow from the samples
            given = getattr(section, field.name)
            # A field that the writer did not have yet had its default.
            before = saved.get(group, {}).get(field.name, getattr(type(section)(), field.name))
            if before != given:
                _refuse(reader, config, flag, field.name, before, given)
                changes.setdefault(flag, []).append(f"{field.name} {before!r} -> {given!r}")
    for flag, told in changes.items():
        shown = flag if getattr(config.checkpoint, flag) else "branch_from"
        logger.info("--%s: %s", shown.replace("_", "-"), ", ".join(told))
    before, given = (_in_order(d) for d in (reader.meta["digests"], digests))
    if before != given:
        _refuse(reader, config, "override_data", "data with digests", before, given)
    before, given = (_of_tokens(d) for d in (reader.meta["digests"], digests))
    # Digests of all bytes are there only where both runs have read them.
    for name in sorted(before.keys() & given.keys()):
        if before[name] != given[name]:
            kind, split, number = name.split(":")
            what = f"tokens ({split} dataset {number}, {kind}) with digest"
            _refuse(reader, config, "override_data", what, before[name], given[name])
    for key, name in (("tokenizer", "the tokenizer"), ("tokens", "the tokens")):
        before, given = (d.get(key) for d in (reader.meta["digests"], digests))
        if before != given and not (key == "tokens" and before is None):  # not kept before
            _refuse(reader, config, "override_tokenizer", name, before, given)


def check_same_layout(
    reader: CheckpointReader, config: ResolvedConfig, layout: dict[str, int]
) -> bool:
    """Whether the generators' states can be taken over: the ranks divide the model as before.

    Raises:
        ConfigError: they do not, and dropout depends on it.
    """
    if {"cp": 1, **reader.meta["layout"]} == layout:  # older ones do not say it
        return True
    dropout = config.model.hidden_dropout or config.model.attention_dropout
    if dropout and not config.checkpoint.override_rng:
        _refuse(
            reader, config, "override_rng", "dropout in the layout", reader.meta["layout"], layout
        )
    return False


def _in_order(digests: dict[str, str]) -> list[str]:
    """Digests without the paths: data that has moved is the same data."""
    return [
        f"{name.split('.')[0]}:{digest}"
        for name, digest in digests.items()
        if name not in ("tokenizer", "tokens") and ":" not in name.split(".")[0]
    ]


def _of_tokens(digests: dict[str, str]) -> dict[str, str]:
    """Digests of the datasets' tokens: "sampled:train:0" and so on."""
    return {name: d for name, d in digests.items() if name.startswith(("sampled:", "sha256:"))}


def _refuse(
    reader: CheckpointReader, config: ResolvedConfig, flag: str, name: str, before: Any, given: Any
) -> None:
    if getattr(config.checkpoint, flag):
        return
    if flag == "override_recipe" and config.checkpoint.branch_from is not None:
        return
    raise ConfigError(
        f"{reader.folder} was trained with {name} {before!r}, this run has {given!r}; "
        f"--{flag.replace('_', '-')} continues with the change"
    )
