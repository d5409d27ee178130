"""What a run starts and learns from: given weights, a teacher, conversations."""

from __future__ import annotations

from collections.abc import Iterator

from megasparse.config.resolved import ResolvedConfig


def check_start(config: ResolvedConfig) -> Iterator[str]:
    """What is wrong with what a run starts and learns from, one line each."""
    yield from _check_fine_tuning(config)
    settings, teacher = config.checkpoint, config.distillation
    if settings.branch_from is not None:
        for name in ("load", "load_hf", "finetune"):
            if getattr(settings, name):
                yield f"branch_from and {name} are both set, expected one start"
    if settings.finetune and settings.load is None:
        yield "finetune needs load, the folder of the weights to start from"
    if not teacher.kd_loss_weight:
        for name in ("teacher_load", "teacher_dtype"):
            if getattr(teacher, name) is not None:
                yield f"{name} is set, but kd_loss_weight is 0: there is no teacher"
    if not teacher.kd_loss_weight and teacher.lm_loss_weight != 1.0:
        yield (
            f"lm_loss_weight {teacher.lm_loss_weight} without a teacher, expected 1; set "
            "kd_loss_weight"
        )


def _check_fine_tuning(config: ResolvedConfig) -> Iterator[str]:
    """Conversations have a tokenizer, and a model to begin with."""
    data, start = config.data, config.checkpoint
    if not data.sft:
        return
    if data.mock_data:
        yield "sft with mock_data, expected conversations (tools/preprocess_data.py --sft)"
    elif data.tokenizer_model is None and data.vocab_file is None:
        yield "sft needs tokenizer_model, that of the conversations"
    if data.eod_mask_loss:
        yield "eod_mask_loss with sft, expected one of the two: sft has the loss on answers alone"
    if start.load is None and start.load_hf is None and not start.resume:
        yield (
            "sft fine-tunes given weights: expected load with finetune, or load_hf (or resume, to "
            "continue)"
        )
