"""What ties the settings of BERT together: refusals."""

from __future__ import annotations

from collections.abc import Iterator

from megasparse.config.resolved import ResolvedConfig

SHORTEST = 8  # a sample's tokens: [CLS], two segments, two [SEP]


def check_bert(config: ResolvedConfig) -> Iterator[str]:
    """What is wrong with the settings of BERT, one line each."""
    model, bert = config.model, config.bert
    if not model.is_bert:
        if model.num_classes is not None:
            yield f"num_classes {model.num_classes} needs model_type bert"
        for name in ("train_data", "valid_data"):
            if getattr(bert, name) is not None:
                yield f"{name} is set, but there is no num_classes: classes are BERT's"
        return
    if model.seq_length < SHORTEST:
        yield f"seq_length {model.seq_length} with model_type bert, expected at least {SHORTEST}"
    for name, found, expected in _only(config):
        if found != expected:
            yield f"{name} {found} with model_type bert is not supported, expected {expected}"
    if config.data.mock_data:
        yield "mock_data with model_type bert is not supported: counting tokens have no gaps"
    if config.parallel.zero_stage >= 2:
        yield (
            f"zero_stage {config.parallel.zero_stage} with model_type bert is not supported, use "
            "zero_stage 1"
        )
    yield from _check_classes(config)


def _only(config: ResolvedConfig) -> list[tuple[str, object, object]]:
    """Settings that BERT has one value of: name, found, expected."""
    model, data = config.model, config.data
    return [
        (
            "pipeline_model_parallel_size",
            config.parallel.pipeline_model_parallel_size,
            1,
        ),
        ("context_parallel_size", config.parallel.context_parallel_size, 1),
        ("position_embedding_type", model.position_embedding_type, "learned_absolute"),
        ("window_size", model.window_size, None),
        ("sft", data.sft, False),
        ("reset_position_ids", data.reset_position_ids, False),
        ("reset_attention_mask", data.reset_attention_mask, False),
        ("eod_mask_loss", data.eod_mask_loss, False),
        ("kd_loss_weight", config.distillation.kd_loss_weight, 0.0),
        ("load_hf", config.checkpoint.load_hf, None),
        ("sample_interval", config.logging.sample_interval, None),
        ("eval_harness_tasks", config.logging.eval_harness_tasks, []),
    ]


def _check_classes(config: ResolvedConfig) -> Iterator[str]:
    model, data, bert = config.model, config.data, config.bert
    if model.num_classes is None:
        if bert.train_data or bert.valid_data:
            yield "train_data and valid_data are of classes, set num_classes"
        return
    if bert.train_data is None:
        yield f"num_classes {model.num_classes} needs train_data"
    if data.tokenizer_model is None and data.vocab_file is None:
        yield f"num_classes {model.num_classes} needs tokenizer_model: train_data are texts"
    if data.data_path or data.train_data_path:
        yield "data_path is set with num_classes, expected train_data alone"
    if config.logging.eval_iters and bert.valid_data is None:
        yield f"eval_iters {config.logging.eval_iters} needs valid_data, or set eval_iters 0"
