"""What ties fields together: refusals, before any memory is allocated.

`resolve(config, world_size)` is a pure function of the configuration and the number of ranks, so
every rank finds the same error without talking to another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megasparse.config.batches import check_train
from megasparse.config.graphs import attention_may_be_fused
from megasparse.config.resolved import (
    ResolvedConfig,
    ResolvedModel,
    data_parallel_size,
    fill_defaults,
)
from megasparse.config.schema import RunConfig
from megasparse.config.schema.model import ModelConfig
from megasparse.config.schema.output import LoggingConfig
from megasparse.config.schema.training import DataConfig, ParallelConfig, TrainConfig
from megasparse.config.validate_bert import check_bert
from megasparse.config.validate_experts import check_experts
from megasparse.config.validate_model import check_model
from megasparse.config.validate_start import check_start
from megasparse.errors import ConfigError, together

# A 2:4 group, and the edge of a transposable block.
BLOCK = 4


def resolve(config: RunConfig, world_size: int) -> ResolvedConfig:
    """A copy with every default filled in.

    Args:
        config: as loaded.
        world_size: number of ranks of the run.

    Raises:
        ConfigError: sizes that do not divide, or settings that exclude each other.
    """
    if problems := problems_of(config, world_size):
        raise together(problems)
    return fill_defaults(config, world_size)


def problems_of(config: RunConfig, world_size: int) -> list[str]:
    """All that is wrong with the settings together, one line each; empty: nothing."""
    try:
        resolved = fill_defaults(config, world_size)
    except ConfigError as error:
        return [str(error)]
    found = [
        *check_model(config.model, resolved.model),
        *_check_parallel(config.parallel, resolved, world_size),
        *_check_train(config.train, resolved, world_size),
        *_check_data(resolved.data, resolved.model),
        *check_bert(resolved),
        *_check_profile(resolved.logging),
        *_check_texts(resolved),
        *check_start(resolved),
        *_check_slorb(resolved),
        *_check_cast(resolved),
        *_check_fp8(resolved),
        *_check_divisible(config.model, resolved),
        *check_experts(resolved, world_size),
    ]
    return list(dict.fromkeys(found))


def gradient_accumulation_steps(config: ResolvedConfig, world_size: int) -> int:
    """Micro-batches that a rank computes in one optimizer step."""
    return config.train.global_batch_size // (
        config.train.micro_batch_size * data_parallel_size(config, world_size)
    )


def padded_vocab_size(vocab_size: int, config: RunConfig) -> int:
    """`vocab_size` rounded up so that every tensor-parallel shard is equal.

    The least common multiple rather than Megatron's product: TP 1, 2 and 4 pad alike, so that each
    reads the others' checkpoints. Padding is no part of the softmax (`hide_padding`).
    """
    multiple = math.lcm(
        config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    )
    return -(-vocab_size // multiple) * multiple


def pipeline_split(config: RunConfig) -> list[int]:
    """Transformer layers of each pipeline stage.

    Raises:
        ConfigError: the layers cannot be divided as asked.
    """
    parallel, layers = config.parallel, config.model.num_layers
    stages = parallel.pipeline_model_parallel_size
    ends = {
        0: parallel.decoder_first_pipeline_num_layers,
        stages - 1: parallel.decoder_last_pipeline_num_layers,
    }
    given = {stage: count for stage, count in ends.items() if count is not None}
    if stages == 1:
        if given:
            raise ConfigError(
                "decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers need "
                "pipeline_model_parallel_size above 1"
            )
        return [layers]
    rest, others = layers - sum(given.values()), stages - len(given)
    if (others and (rest < others or rest % others)) or (not others and rest):
        fixed = "".join(f", {count} of them on stage {stage}" for stage, count in given.items())
        raise ConfigError(
            f"num_layers {layers}{fixed} cannot be divided evenly over "
            f"pipeline_model_parallel_size {stages}"
        )
    return [given.get(stage, rest // max(others, 1)) for stage in range(stages)]


def _check_parallel(
    given: ParallelConfig, config: ResolvedConfig, world_size: int
) -> Iterator[str]:
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    if world_size % (tp * cp * pp):
        yield (
            f"world size {world_size} is not divisible by tensor_model_parallel_size {tp} x "
            f"context_parallel_size {cp} x pipeline_model_parallel_size {pp}"
        )
    try:
        smallest = min(pipeline_split(config))
    except ConfigError as error:
        yield str(error)
    else:
        yield from _check_recompute(given, config, smallest)
    if parallel.zero_stage >= 2 and pp > 1:
        yield (
            f"zero_stage {parallel.zero_stage} with pipeline_model_parallel_size {pp} is not "
            "supported (micro-batches need gradients that are whole), use zero_stage 1"
        )
    if cp > 1:
        yield from _check_context(config, tp, cp)
    elif parallel.sequence_parallel and config.model.seq_length % tp:
        yield (
            f"sequence_parallel: seq_length {config.model.seq_length} is not divisible by "
            f"tensor_model_parallel_size {tp}"
        )


def _check_context(config: ResolvedConfig, tp: int, cp: int) -> Iterator[str]:
    """Every rank has two chunks of a sequence, and MVUE's groups of tokens lie within one."""
    length, sequences = config.model.seq_length, config.train.micro_batch_size
    split = tp if config.parallel.sequence_parallel else 1
    if length % (2 * cp) or length // cp % split:
        also = f", and by {cp} x tensor_model_parallel_size {tp}" if split > 1 else ""
        yield (f"seq_length {length} is not divisible by 2 x context_parallel_size {cp}{also}")
    elif length // (2 * cp) * sequences % BLOCK:
        yield (
            f"seq_length {length} over 2 x context_parallel_size {cp}, times micro_batch_size "
            f"{sequences}, leaves chunks of {length // (2 * cp) * sequences} tokens; expected a "
            f"multiple of {BLOCK}, the tokens of an MVUE group"
        )
    exchange = config.parallel.cp_comm_type
    if config.model.window and exchange == "p2p" and attention_may_be_fused(config):
        yield (
            f"window_size {config.model.window_size} with cp_comm_type p2p, in which Transformer "
            "Engine's attention takes no windows, expected all_gather"
        )
    groups = config.sparsity.mvue_groups
    if groups == "strided" or (groups == "auto" and sequences % BLOCK):
        yield (
            f"mvue_groups {groups} with context_parallel_size {cp}: a group's tokens would be on "
            "several ranks, expected neighbours"
        )


def _check_recompute(given: ParallelConfig, config: ResolvedConfig, smallest: int) -> Iterator[str]:
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        if given.recompute_method or given.recompute_num_layers:
            yield (
                "recompute_method and recompute_num_layers need recompute_granularity full, "
                f"found {parallel.recompute_granularity}"
            )
        return
    if parallel.recompute_chunk > smallest:
        yield (
            f"recompute_num_layers {parallel.recompute_chunk}, expected at most the "
            f"{smallest} layers of a stage"
        )
    if (
        parallel.pipeline_model_parallel_size > 1
        and parallel.recompute_method == "uniform"
        and parallel.recompute_chunk > 1
    ):
        yield (
            f"recompute_num_layers {parallel.recompute_chunk} with recompute_method uniform "
            "and pipeline parallelism, expected 1 (each layer is a part of the pipeline)"
        )


def _check_train(given: TrainConfig, config: ResolvedConfig, world_size: int) -> Iterator[str]:
    train = config.train
    per_step = train.micro_batch_size * data_parallel_size(config, world_size)
    if per_step and train.global_batch_size % per_step:
        yield (
            f"global_batch_size {train.global_batch_size} is not divisible by micro_batch_size "
            f"{train.micro_batch_size} x data parallel size "
            f"{data_parallel_size(config, world_size)}"
        )
    yield from check_train(given, train, per_step)
    if train.min_lr > train.lr:
        yield f"min_lr {train.min_lr} is above lr {train.lr}"
    if train.decoupled_lr is not None:
        low = train.min_lr if train.decoupled_min_lr is None else train.decoupled_min_lr
        if low > train.decoupled_lr:
            yield f"decoupled_min_lr {low} is above decoupled_lr {train.decoupled_lr}"
    elif train.decoupled_min_lr is not None:
        yield f"decoupled_min_lr {train.decoupled_min_lr} needs decoupled_lr"
    sparsity = config.sparsity
    dense = (sparsity.dense_warmup_fraction or 0.0) + (sparsity.dense_tail_fraction or 0.0)
    if dense > 1.0:
        yield (f"dense_warmup_fraction + dense_tail_fraction is {dense}, expected at most 1")


def _check_profile(logging: LoggingConfig) -> Iterator[str]:
    first, last = logging.profile_step_start, logging.profile_step_end
    if logging.profile and last <= first:
        yield f"profile_step_end {last}, expected more than profile_step_start {first}"
    wrong = [rank for rank in logging.profile_ranks if not rank.isdigit()]
    if wrong:
        yield f"profile_ranks: found {wrong[0]!r}, expected numbers of ranks"


def _check_data(data: DataConfig, model: ResolvedModel) -> Iterator[str]:
    per_split = bool(data.train_data_path or data.valid_data_path or data.test_data_path)
    sources = [bool(data.data_path), per_split, data.mock_data]
    if sum(sources) != 1 and model.num_classes is None:
        yield (
            "the data must come from exactly one of data_path, train_data_path (with "
            f"valid_data_path, test_data_path) and mock_data; found {sum(sources)}"
        )
    if per_split and not data.train_data_path:
        yield "valid_data_path or test_data_path is set without train_data_path"
    if data.multiple_validation_sets and not data.valid_data_path:
        yield "multiple_validation_sets needs valid_data_path"
    if data.mock_data:
        if model.vocab_size is None and data.tokenizer_model is None:
            yield "mock_data needs vocab_size, or tokenizer_model"
    elif data.tokenizer_model is None and data.vocab_file is None and model.vocab_size is None:
        yield "neither tokenizer_model nor vocab_size is set; the model needs one"

    if (data.vocab_file is None) != (data.merge_file is None):
        yield "vocab_file and merge_file go together, found one of them"
    elif data.vocab_file is not None and data.tokenizer_model is not None:
        yield "tokenizer_model and vocab_file are both set, expected one tokenizer"


def _check_texts(config: ResolvedConfig) -> Iterator[str]:
    """What is made of texts needs a tokenizer."""
    if config.data.tokenizer_model is not None or config.data.vocab_file is not None:
        return
    if config.logging.eval_harness_tasks:
        yield "eval_harness_tasks is set without tokenizer_model: tasks are texts"
    # Mock data have a tokenizer of numbers.
    if config.logging.sample_interval is not None and not config.data.mock_data:
        yield "sample_interval is set without tokenizer_model: a run on token ids has no texts"


def _check_slorb(config: ResolvedConfig) -> Iterator[str]:
    """SLoRB makes up for what masks prune, from the first step to the last."""
    sparsity = config.sparsity
    if sparsity.slorb_k is None:
        return
    if config.parallel.zero_stage == 3:
        yield "slorb_k with zero_stage 3 is not supported, use zero_stage 2"
    if sparsity.dense_warmup_fraction or sparsity.dense_tail_fraction:
        yield "slorb_k needs a run without dense_warmup_fraction, dense_tail_fraction"


def _check_cast(config: ResolvedConfig) -> Iterator[str]:
    """CAST's weight is a product of two parameters, computed anew in each pass."""
    if config.sparsity.sparsity_recipe != "cast":
        return
    if config.parallel.zero_stage == 3:
        yield "sparsity_recipe cast with zero_stage 3 is not supported, use zero_stage 2"
    if config.fp8.fp8_format is not None:
        yield "sparsity_recipe cast with fp8_format is not supported: its GEMMs are not in 8 bits"


def _check_fp8(config: ResolvedConfig) -> Iterator[str]:
    wanted = config.fp8.fp8_format
    if wanted is None:
        return
    if not config.train.bf16 and not config.fp8.fp8_fallback:
        yield f"fp8_format {wanted} in float32, expected --bf16"
    if config.sparsity.simulate_fp8:
        yield f"fp8_format {wanted} with simulate_fp8, expected one of the two"
    if config.fp8.fp8_recipe == "tensorwise" and config.fp8.fp8_margin:
        yield (
            f"fp8_margin {config.fp8.fp8_margin} with fp8_recipe tensorwise, expected 0: a scale "
            "that follows from the tensor itself leaves no margin"
        )


def _check_divisible(given: ModelConfig, config: ResolvedConfig) -> Iterator[str]:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    for name, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.num_query_groups),
    ):
        if value % tp:
            yield f"{name} {value} is not divisible by tensor_model_parallel_size {tp}"
    # Every dimension of a shard that could be pruned; 4x4 blocks must not straddle ranks or the
    # logical matrices inside fused QKV and gate/up.
    for name, value, parts in (
        ("hidden_size", model.hidden_size, 1),
        ("ffn_hidden_size", model.ffn_hidden_size, tp),
        ("kv_channels", model.kv_channels, 1),
    ):
        if (
            name == "kv_channels"
            and given.kv_channels is None
            and model.hidden_size % (model.num_attention_heads)
        ):
            continue  # of heads that do not divide, which is told already
        if value % (BLOCK * parts):
            yield (
                f"{name} {value} over tensor_model_parallel_size {parts} leaves a shard that cuts "
                f"a {BLOCK}x{BLOCK} block; expected a multiple of {BLOCK * parts}"
            )
