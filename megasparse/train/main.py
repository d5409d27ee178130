"""From flags to a finished run, with one clear line on every rank when something is wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from megasparse import log
from megasparse.config import RunConfig, load_config, resolve
from megasparse.errors import MegasparseError
from megasparse.megatron.grid import make_grid
from megasparse.train.checkpoint import check_writable
from megasparse.train.data import build_data, check_data
from megasparse.train.loop import Trainer, recipe_of
from megasparse.train.process import start_process, stop_process


def pretrain(config: RunConfig) -> None:
    """Run a resolved configuration to its end on this rank.

    What can be checked without other ranks (recipe, files, folders) is checked before any of them
    is waited for, on every rank alike.
    """
    recipe_of(config)
    check_data(config)
    check_writable(config.checkpoint.run_dir)
    check_writable(config.checkpoint.save or "")
    device = start_process(config.parallel.distributed_timeout_minutes)
    grid = make_grid(
        config.parallel.tensor_model_parallel_size,
        device,
        config.train.seed,
        config.parallel.distributed_timeout_minutes,
        config.parallel.pipeline_model_parallel_size,
    )
    Trainer(config, grid, build_data(config, grid)).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `launch/pretrain.py`; the exit code of this rank."""
    rank = int(os.environ.get("RANK", "0"))
    log.setup(rank)
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        pretrain(resolve(load_config(sys.argv[1:] if argv is None else argv), world))
    except MegasparseError as error:
        log.logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except Exception:
        log.logger.error("unexpected error\n%s", traceback.format_exc())
        return 1
    stop_process()
    return 0
