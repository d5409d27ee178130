"""A configuration whose defaults are filled in, as a type: what `resolve` fills is not optional.

`ResolvedConfig` is a `RunConfig` with the same fields, help texts and YAML. Its groups only narrow
the types of what has a default that depends on other settings, so that mypy proves what would
otherwise be asserted where it is used.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from typing import Any, TypeVar

from megasparse.config.batches import fill_train
from megasparse.config.schema import RunConfig
from megasparse.config.schema.model import ModelConfig
from megasparse.config.schema.output import CheckpointConfig, LoggingConfig
from megasparse.config.schema.sparsity import EXPERT_SPARSE_LAYERS, SPARSE_LAYERS
from megasparse.config.schema.training import ParallelConfig, TrainConfig
from megasparse.errors import ConfigError

Group = TypeVar("Group")
SAMPLE_TOKENS = 64


class ResolvedModel(ModelConfig):
    """The model with every size known but, maybe, that of the vocabulary."""

    ffn_hidden_size: int
    num_query_groups: int
    kv_channels: int
    max_position_embeddings: int


class CompleteModel(ResolvedModel):
    """A model that exists: its vocabulary (before padding) is known too."""

    vocab_size: int


class ResolvedParallel(ParallelConfig):
    """The layout with the ZeRO stage chosen."""

    zero_stage: int

    @property
    def recompute_chunk(self) -> int:
        """`recompute_num_layers` of full recomputation: the layers of a chunk (uniform), or those
        of a stage that are recomputed (block)."""
        return self.recompute_num_layers or 1


class ResolvedTrain(TrainConfig):
    """Training with batch, length and schedule known (`config/batches.py`)."""

    global_batch_size: int
    train_iters: int


class ResolvedCheckpoint(CheckpointConfig):
    """Checkpoints with their folder known."""

    save: str


class ResolvedLogging(LoggingConfig):
    """Logging with its folder and the length of samples known."""

    tensorboard_dir: str
    sample_tokens: int


class ResolvedConfig(RunConfig):
    """A run's configuration with every default filled in; `resolve` makes it."""

    model: ResolvedModel
    parallel: ResolvedParallel
    train: ResolvedTrain
    checkpoint: ResolvedCheckpoint
    logging: ResolvedLogging


def fill_defaults(config: RunConfig, world_size: int) -> ResolvedConfig:
    """A copy with every default filled in, and nothing refused: `resolve` does that.

    It fills what is unset (`changed_settings` has what else), so what has been filled once stays as
    it is.

    Args:
        config: as loaded, or a part of one: a model alone is enough.
        world_size: number of ranks of the run.
    """
    groups = {
        group.name: dataclasses.replace(getattr(config, group.name))
        for group in dataclasses.fields(config)
    }
    copy = RunConfig(**groups)
    _fill_model(copy.model)
    if copy.model.num_experts and tuple(copy.sparsity.sparse_layers) == SPARSE_LAYERS:
        copy.sparsity.sparse_layers = list(EXPERT_SPARSE_LAYERS)
    _fill_parallel(copy)
    fill_train(copy.train, copy.train.micro_batch_size * data_parallel_size(copy, world_size))
    run_dir = copy.checkpoint.run_dir
    copy.checkpoint.save = copy.checkpoint.save or f"{run_dir}/checkpoints"
    if _is_continued(config):
        copy.checkpoint.load, copy.checkpoint.resume = None, True
    _fill_logging(copy.logging, run_dir)
    _fill_fine_tuning(copy)
    return ResolvedConfig(
        **{
            name: narrowed(kind, getattr(copy, name), name)
            for name, kind in typing.get_type_hints(ResolvedConfig).items()
        }
    )


def narrowed(kind: type[Group], settings: Any, where: str) -> Group:
    """The settings of a group as `kind`, a class with the same fields but narrower types.

    Raises:
        ConfigError: a field is not set that `kind` promises; names it.
    """
    values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    for name, hint in typing.get_type_hints(kind).items():
        if values[name] is None and types.NoneType not in typing.get_args(hint):
            raise ConfigError(f"{where}: {name} is not set")
    return kind(**values)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Ranks that hold the same part of the model and train it on other samples."""
    return replicas(config, world_size) // config.parallel.context_parallel_size


def replicas(config: RunConfig, world_size: int) -> int:
    """Ranks that hold the same part of the model: data parallel x context parallel."""
    parallel = config.parallel
    return world_size // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    )


def smallest_world(config: RunConfig) -> int:
    """Ranks that hold the whole model once and compute whole sequences: the fewest of a run."""
    parallel = config.parallel
    sizes = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    # Experts are divided over the ranks that hold the same of all else, whatever their tokens.
    return sizes * math.lcm(parallel.context_parallel_size, parallel.expert_model_parallel_size)


def tokens_here(config: RunConfig) -> int:
    """Tokens of a micro-batch that a rank has; sequence parallelism divides them further."""
    whole = config.train.micro_batch_size * config.model.seq_length
    return whole // config.parallel.context_parallel_size


def _fill_model(model: ModelConfig) -> None:
    if model.ffn_hidden_size is None:
        gated = int(8 * model.hidden_size / 3) // 64 * 64
        model.ffn_hidden_size = max(gated, 64) if model.gated else 4 * model.hidden_size
    if model.kv_channels is None:
        model.kv_channels = model.hidden_size // model.num_attention_heads
    model.num_query_groups = model.num_query_groups or model.num_attention_heads
    model.group_query_attention = model.num_query_groups != model.num_attention_heads
    if model.num_experts is not None:
        model.moe_ffn_hidden_size = model.moe_ffn_hidden_size or model.ffn_hidden_size
    model.max_position_embeddings = model.max_position_embeddings or model.seq_length


def _fill_logging(logging: LoggingConfig, run_dir: str) -> None:
    logging.tensorboard_dir = logging.tensorboard_dir or f"{run_dir}/tensorboard"
    if logging.sample_tokens is None:
        logging.sample_tokens = 0 if logging.sample_interval is None else SAMPLE_TOKENS


def _fill_fine_tuning(config: RunConfig) -> None:
    """With `sft`: conversations see themselves alone, and templates are written in control tokens.
    With it and with classes, what the run starts from stays sparse to the end."""
    data, sparsity = config.data, config.sparsity
    tuned = data.sft or config.model.num_classes is not None
    if sparsity.freeze_masks is None:
        sparsity.freeze_masks = tuned
    if tuned and sparsity.dense_tail_fraction is None:
        sparsity.dense_tail_fraction = 0.0
    if data.sft:
        data.reset_position_ids = data.reset_attention_mask = data.parse_special = True


def _fill_parallel(config: RunConfig) -> None:
    parallel = config.parallel
    if parallel.recompute_granularity == "full":
        parallel.recompute_method = parallel.recompute_method or "uniform"
        parallel.recompute_num_layers = parallel.recompute_num_layers or 1
    if parallel.zero_stage is None or _is_zero_without_masters(config):
        parallel.zero_stage = 1 if config.train.bf16 else 0
    parallel.sequence_parallel &= not _is_nothing_to_split(config)


def _is_zero_without_masters(config: RunConfig) -> bool:
    # DeepSpeed's BF16 wrapper without ZeRO ends at a worse loss; ZeRO 1 is equal in cost.
    return config.train.bf16 and config.parallel.zero_stage == 0


def _is_nothing_to_split(config: RunConfig) -> bool:
    return config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1


def _is_continued(config: RunConfig) -> bool:
    """Whether the run loads from where it saves, as Megatron's users continue one."""
    settings = config.checkpoint
    if settings.load is None or settings.finetune:
        return False
    own = (settings.save or f"{settings.run_dir}/checkpoints", settings.run_dir)
    return os.path.abspath(settings.load) in [os.path.abspath(folder) for folder in own]


def changed_settings(config: RunConfig) -> list[str]:
    """What `fill_defaults` sets otherwise than it was given, as Megatron does; one line each."""
    changed = []
    if _is_zero_without_masters(config):
        changed.append("zero_stage 0 becomes 1: BF16 needs its float32 masters")
    if _is_nothing_to_split(config):
        changed.append("sequence_parallel is off: tensor_model_parallel_size is 1")
    if _is_continued(config) and not config.checkpoint.resume:
        changed.append("load is save: the run continues from there, or starts (as with --resume)")
    return changed
