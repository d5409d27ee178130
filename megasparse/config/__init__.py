"""The typed run configuration: schema, loading, and what ties its fields together."""

from megasparse.config.command_line import CommandLine, build_parser
from megasparse.config.loader import dump_yaml, from_dict, load_config, read_config, to_dict
from megasparse.config.resolved import (
    CompleteModel,
    ResolvedCheckpoint,
    ResolvedConfig,
    ResolvedLogging,
    ResolvedModel,
    ResolvedParallel,
    ResolvedTrain,
    changed_settings,
    data_parallel_size,
    fill_defaults,
    narrowed,
    replicas,
    smallest_world,
    tokens_here,
)
from megasparse.config.schema import RunConfig
from megasparse.config.schema.model import ModelConfig
from megasparse.config.schema.output import CheckpointConfig, LoggingConfig
from megasparse.config.schema.sparsity import Fp8Config, SparsityConfig
from megasparse.config.schema.training import (
    DataConfig,
    DistillationConfig,
    ParallelConfig,
    TrainConfig,
)
from megasparse.config.validate import (
    gradient_accumulation_steps,
    padded_vocab_size,
    pipeline_split,
    problems_of,
    resolve,
)

__all__ = [
    "CheckpointConfig",
    "CommandLine",
    "CompleteModel",
    "DataConfig",
    "DistillationConfig",
    "Fp8Config",
    "LoggingConfig",
    "ModelConfig",
    "ParallelConfig",
    "ResolvedCheckpoint",
    "ResolvedConfig",
    "ResolvedLogging",
    "ResolvedModel",
    "ResolvedParallel",
    "ResolvedTrain",
    "RunConfig",
    "SparsityConfig",
    "TrainConfig",
    "build_parser",
    "changed_settings",
    "data_parallel_size",
    "dump_yaml",
    "fill_defaults",
    "from_dict",
    "gradient_accumulation_steps",
    "load_config",
    "narrowed",
    "padded_vocab_size",
    "pipeline_split",
    "problems_of",
    "read_config",
    "replicas",
    "resolve",
    "smallest_world",
    "to_dict",
    "tokens_here",
]
