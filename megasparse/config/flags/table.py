"""The table of Megatron's and Megatron-DeepSpeed's flags, one row a flag, and what a row says."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megasparse.config.flags.megatron import NOTHING, TRANSLATED
from megasparse.config.flags.missing import FAMILIES, MISSING


@dataclass(frozen=True)
class Row:
    """What becomes of one flag that is none of ours.

    Attributes:
        flag: with its dashes.
        takes: how many values it has: "0", "1" or "*".
        only: the values for which the row holds; empty: all.
        becomes: flags of ours, `{}` for its value; None: there is nothing to do, or it is missing.
        missing: whether a run without it would be another one.
        says: the reason, or what helps instead.
    """

    flag: str
    takes: str
    only: tuple[str, ...]
    becomes: str | None
    missing: bool
    says: str

    def holds(self, values: Sequence[str]) -> bool:
        """Whether the row speaks of these values."""
        return not self.only or (len(values) == 1 and values[0] in self.only)


@functools.cache
def rows() -> dict[str, tuple[Row, ...]]:
    """The rows by flag, in the order in which they are asked."""
    table: dict[str, list[Row]] = {}
    for row in _all():
        table.setdefault(row.flag, []).append(row)
    return {flag: tuple(found) for flag, found in table.items()}


def family(flag: str) -> str | None:
    """What is said of every flag that begins as this one does, if there is such a row."""
    return next((says for start, says in FAMILIES if flag.startswith(start)), None)


def _all() -> Iterator[Row]:
    for form, becomes, says in TRANSLATED:
        yield _row(form, becomes, False, says)
    for says, forms in NOTHING:
        for form in forms.split():
            yield _row(form, None, False, says)
    for says, forms in MISSING:
        for form in forms.split():
            yield _row(form, None, True, says)


def _row(form: str, becomes: str | None, missing: bool, says: str) -> Row:
    flag, equals, values = form.partition("=")
    only = tuple(values.split("|")) if values not in ("", "*") else ()
    takes = "*" if values == "*" else ("1" if equals else "0")
    return Row(flag, takes, only, becomes, missing, says)


# Fields that no Megatron has; all others mean there what they mean here.
_OURS = """
    listen_on_all_interfaces geglu relu exact_gelu parallel_residual norm_placement
    qk_layernorm_scope lr_linear_to_zero_iters lr_linear_to_zero_samples
    model_type bert_binary_head num_classes cls_token sep_token mask_token train_data valid_data
    eod_token bos_token add_bos parse_special max_skipped_steps
    tp_comm_peer_memory
    replica_check_interval hang_timeout preflight preflight_min_bandwidth
    verify_data
    sparsity_recipe sparse_layers mask_update_interval freeze_masks masked_decay
    masked_decay_ramp_iters masked_decay_rho masked_decay_update_interval
    masked_decay_before_clipping mvue mvue_groups operand_packing sparse_grad_input
    dense_warmup_fraction dense_tail_fraction sparsity_phases s_ste_scale simulate_fp8
    mask_metric weight_scale_groups slorb_k slorb_train_projection track_flip_rate
    kd_loss_weight lm_loss_weight kd_temperature teacher_load teacher_dtype
    run_dir load_hf branch_from resume keep_last max_failed_saves max_restarts
    max_restarts_without_progress
    override_batch override_seq_length override_seed override_data override_tokenizer
    override_schedule override_precision override_model override_recipe override_distillation
    override_rng fp8_fallback calibration_samples log_level log_csv log_layers peak_tflops
    sample_prompt sample_tokens profile_eager mlflow_experiment mlflow_run_name
    mlflow_tracking_uri sample_interval eval_harness_tasks eval_harness_interval
    eval_harness_num_fewshot eval_harness_limit eval_harness_include_path
"""
OURS_ALONE = frozenset(_OURS.split())
