"""What can be checked without other ranks, and without torch: seconds before anything is built.

Every rank does all of it, so a mistake is one clear line on every rank, and none waits for others.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megasparse.checkpoint.directory import list_steps, make_private
from megasparse.config import ResolvedConfig, load_config, resolve
from megasparse.config.deepspeed import deepspeed_config
from megasparse.data.check import CheckedData, check_data
from megasparse.distributed.faults import from_environment
from megasparse.errors import CheckpointError, ConfigError
from megasparse.sparsity.recipe import recipe_of


@dataclass(frozen=True)
class Prepared:
    """A configuration that has passed all checks, and the files that it names."""

    config: ResolvedConfig
    data: CheckedData


def prepare(argv: Sequence[str], world_size: int) -> Prepared:
    """Flags to a checked run, before any process group or model is built.

    Args:
        argv: flags, `--config` among them.
        world_size: ranks of the launch.

    Raises:
        ConfigError: a flag, a key, or a combination of them, also with DeepSpeed's file.
        DataError: a dataset or tokenizer is missing, damaged, or does not fit the run.
        CheckpointError: `--load` or `--resume` names none, or a folder of another run.
    """
    config = resolve(load_config(argv), world_size)
    deepspeed_config(config, world_size)
    return check(config)


def check(config: ResolvedConfig) -> Prepared:
    """Check a configuration.

    Raises:
        ConfigError, DataError, CheckpointError: as of `prepare`.
    """
    recipe_of(config)
    from_environment(0)
    if config.logging.wandb_project:
        try:
            importlib.metadata.version("wandb")
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                f"wandb_project {config.logging.wandb_project!r}: the package wandb is not "
                "installed; pip install wandb, or leave the flag out (TensorBoard files are always "
                "written)"
            ) from None
    settings = config.checkpoint
    _check_folder_names(config)
    save = Path(settings.save)
    if list_steps(save) and not settings.resume:
        raise ConfigError(
            f"save: {save} already holds checkpoints of a run; continue it with --resume, or "
            "choose another --run-dir"
        )
    if settings.load is not None and not (settings.resume and list_steps(save)):
        if not Path(settings.load).is_dir():
            raise CheckpointError(f"load: {settings.load} is no folder; it holds no checkpoint")
        if not list_steps(Path(settings.load)):
            raise CheckpointError(f"load: {settings.load} holds no checkpoint")
    if settings.load_hf is not None:
        if settings.load is not None:
            raise ConfigError("load and load_hf are both set, expected one")
        if not (Path(settings.load_hf) / "config.json").is_file():
            raise CheckpointError(f"load_hf: {settings.load_hf} holds no config.json of a model")
    _check_teacher(config)
    data = check_data(config)
    make_private(settings.run_dir)
    make_private(save)
    return Prepared(config, data)


def no_teacher(weight: float) -> str:
    """The message for distillation without a teacher."""
    return (
        f"kd_loss_weight {weight} needs a teacher: --teacher-load DIR, or initial weights "
        "(--load-hf DIR, or --load DIR --finetune)"
    )


def _check_teacher(config: ResolvedConfig) -> None:
    """Distillation has a teacher, as far as the settings show it."""
    wanted, settings = config.distillation, config.checkpoint
    if not wanted.kd_loss_weight:
        return
    if wanted.teacher_load is None:
        if settings.load_hf is None and settings.load is None:
            raise ConfigError(no_teacher(wanted.kd_loss_weight))
        return
    if not list_steps(Path(wanted.teacher_load)):
        raise CheckpointError(f"teacher_load: {wanted.teacher_load} holds no checkpoint")


def _check_folder_names(config: ResolvedConfig) -> None:
    settings = config.checkpoint
    same = (
        settings.load is not None and Path(settings.load).resolve() == Path(settings.save).resolve()
    )
    if same and not settings.resume:
        raise ConfigError(
            f"load: {settings.load} is the folder that this run saves to; continue it with --resume"
        )
