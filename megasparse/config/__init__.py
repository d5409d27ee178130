"""The typed run configuration: schema, loading, and what ties its fields together."""

from megasparse.config.loader import build_parser, dump_yaml, from_dict, load_config, to_dict
from megasparse.config.schema import (
    CheckpointConfig,
    DataConfig,
    DistillationConfig,
    Fp8Config,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SparsityConfig,
    TrainConfig,
)
from megasparse.config.validate import (
    data_parallel_size,
    gradient_accumulation_steps,
    padded_vocab_size,
    pipeline_split,
    resolve,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistillationConfig",
    "Fp8Config",
    "LoggingConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "SparsityConfig",
    "TrainConfig",
    "build_parser",
    "data_parallel_size",
    "dump_yaml",
    "from_dict",
    "gradient_accumulation_steps",
    "load_config",
    "padded_vocab_size",
    "pipeline_split",
    "resolve",
    "to_dict",
]
