"""The training run: DeepSpeed engine, loop, checkpoints, metrics."""

from megasparse.extras import require

require("deepspeed", "megasparse.train")
