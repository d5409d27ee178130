"""The typed run configuration: one dataclass a group, every field name unique across groups.

A field is at once a YAML key (`group: {field: value}`), a flag (`--field-with-dashes`, spelled as
in Megatron) and an attribute (`config.group.field`). The text in `option(...)` is the flag's help.
`choices` and bounds that concern one field alone live there; what ties fields together is in
`validate.py`. The groups themselves are in `model.py`, `sparsity.py`,
`training.py`, `bert.py` and `output.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megasparse.config.schema.bert import BertConfig
from megasparse.config.schema.model import ModelConfig
from megasparse.config.schema.output import CheckpointConfig, LoggingConfig
from megasparse.config.schema.sparsity import Fp8Config, SparsityConfig
from megasparse.config.schema.training import (
    DataConfig,
    DistillationConfig,
    ParallelConfig,
    TrainConfig,
)


@dataclass
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    bert: BertConfig = field(default_factory=BertConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
