"""The typed run configuration: schema, loading, and what ties its fields together."""

from megasparse.config.loader import build_parser, dump_yaml, from_dict, load_config, to_dict
from megasparse.config.resolved import (
    CompleteModel,
    ResolvedCheckpoint,
    ResolvedConfig,
    ResolvedLogging,
    ResolvedModel,
    ResolvedParallel,
    ResolvedTrain,
    data_parallel_size,
    fill_defaults,
    narrowed,
)
from megasparse.config.schema import RunConfig
from megasparse.config.schema_model import Fp8Config, ModelConfig, SparsityConfig
from megasparse.config.schema_output import CheckpointConfig, LoggingConfig
from megasparse.config.schema_training import (
    DataConfig,
    DistillationConfig,
    ParallelConfig,
    TrainConfig,
)
from megasparse.config.validate import (
    gradient_accumulation_steps,
    padded_vocab_size,
    pipeline_split,
    resolve,
)

__all__ = [
    "CheckpointConfig",
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
    "data_parallel_size",
    "dump_yaml",
    "fill_defaults",
    "from_dict",
    "gradient_accumulation_steps",
    "load_config",
    "narrowed",
    "padded_vocab_size",
    "pipeline_split",
    "resolve",
    "to_dict",
]
