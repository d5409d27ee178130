"""What can be checked without other ranks, and without torch: seconds before anything is built.

Every rank does all of it, so a mistake is one clear line on every rank, and none waits for others.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text
from megasparse.checkpoint.directory import checkpoint_root, list_steps, make_private
from megasparse.checkpoint.lock import require_free
from megasparse.checkpoint.manifest import MANIFEST
from megasparse.config import (
    CommandLine,
    ResolvedConfig,
    RunConfig,
    changed_settings,
    problems_of,
    read_config,
    resolve,
)
from megasparse.config.deepspeed.derived import deepspeed_config
from megasparse.data.check import CheckedData, check_data
from megasparse.data.tokenizers.bpe_files import bpe_tokenizer_json
from megasparse.distributed.environment import is_same_launch
from megasparse.distributed.faults import from_environment
from megasparse.distributed.supervise import is_supervised
from megasparse.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MegasparseError,
    StorageError,
    one_line,
    together,
)
from megasparse.preflight.exposure import exposed_inputs
from megasparse.preflight.load_hf import take_over
from megasparse.sparsity.run_recipe import recipe_of

# Settings that want a package that megasparse does not bring (`megasparse.metrics.trackers`).
_TRACKERS = {"wandb_project": "wandb", "mlflow_experiment": "mlflow"}


@dataclass(frozen=True)
class Prepared:
    """A configuration that has passed all checks, and the files that it names.

    Attributes:
        notes: what became of flags and settings that are not taken as they are.
        warnings: what the user should know of the files.
    """

    config: ResolvedConfig
    data: CheckedData
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def prepare(
    argv: Sequence[str],
    world_size: int,
    known: Callable[[ResolvedConfig], object] = lambda _: None,
    write: bool = True,
) -> Prepared:
    """Flags to a checked run, before any process group or model is built.

    Args:
        argv: flags, `--config` among them.
        world_size: ranks of the launch.
        known: called with the settings once they are a run, before its files are looked at.
        write: make the run's folders; without, nothing is written.

    Raises:
        StorageError: another run writes into its folders; that alone counts then.
        ConfigError: a flag, a key, or a combination of them, also with DeepSpeed's file.
        DataError: a dataset or tokenizer is missing, damaged, or does not fit the run.
        CheckpointError: `--load` or `--resume` names none, or a folder of another run.
        All that is found is in the error's `problems`.
    """
    given, line = read_config(argv, world_size=world_size)
    try:
        line.problems += take_over(given, line.given)
    except MegasparseError as error:
        if line.problems:
            raise together([*line.problems, one_line(error)]) from None
        raise
    problems = [*line.problems, *problems_of(given, world_size)]
    if len(problems) == len(line.problems):
        # The settings are a run, so what it needs can be looked at, also when more is wrong.
        config = resolve(given, world_size)
        known(config)
        require_own_folders(config)
        problems += _messages([lambda: deepspeed_config(config, world_size)])
        if problems:
            problems += _messages(_checks(config))
    if problems:
        raise together(list(dict.fromkeys(problems)))
    checked = check(config, write)
    exposed = exposed_inputs(config, checked.data, line.configs)
    warnings = (exposed,) if exposed is not None else ()
    return replace(checked, notes=_notes(given, line), warnings=warnings)


def check(config: ResolvedConfig, write: bool = True) -> Prepared:
    """Check a configuration, and make the run's folders if it is to `write`.

    Raises:
        ConfigError, DataError, CheckpointError: as of `prepare`.
        StorageError: a folder cannot be written, or another run writes into it.
    """
    require_own_folders(config)
    errors = _errors(_checks(config))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise together([one_line(error) for error in errors], type(errors[0]))
    with _tokenizer_made(config, write):
        try:
            data = check_data(config, every_byte=config.parallel.preflight == "full")
        except OSError as error:
            raise DataError(one_line(error)) from None
    if write:
        make_private(config.checkpoint.run_dir)
        make_private(config.checkpoint.save)
    return Prepared(config, data)


@contextmanager
def _tokenizer_made(config: ResolvedConfig, write: bool) -> Iterator[None]:
    """The run's own tokenizer.json of GPT-2's two files, which exports and evaluations find.

    Without `write` it is there for the checks alone, and the settings stay.
    """
    data = config.data
    if data.vocab_file is None or data.merge_file is None:
        yield
        return
    text = bpe_tokenizer_json(Path(data.vocab_file), Path(data.merge_file))
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_private(config.checkpoint.run_dir) if write else Path(scratch)
        write_text(folder / "tokenizer.json", text)
        before = data.vocab_file, data.merge_file
        data.tokenizer_model = str(folder / "tokenizer.json")
        data.vocab_file = data.merge_file = None
        yield
        if not write:
            data.tokenizer_model, (data.vocab_file, data.merge_file) = None, before


def _notes(given: RunConfig, line: CommandLine) -> tuple[str, ...]:
    notes = [*line.translated, *changed_settings(given)]
    if line.nothing_to_do:
        notes.append(
            f"nothing to do for {', '.join(line.nothing_to_do)} (docs/megatron.md says why)"
        )
    return tuple(notes)


def _checks(config: ResolvedConfig) -> list[Callable[[], object]]:
    """What can be checked of a run apart from its neighbours; none of them writes."""
    checks = [
        _check_recipe,
        _check_trackers,
        _check_tasks,
        _check_save,
        _check_load,
        _check_branch,
        _check_load_hf,
        _check_teacher,
    ]
    return [*(partial(one, config) for one in checks), lambda: from_environment(0)]


def _errors(checks: list[Callable[[], object]]) -> list[MegasparseError]:
    found = []
    for one in checks:
        try:
            one()
        except MegasparseError as error:
            found.append(error)
        except OSError as error:  # a name too long, a loop of links
            found.append(StorageError(one_line(error)))
    return found


def _messages(checks: list[Callable[[], object]]) -> list[str]:
    return [line for error in _errors(checks) for line in error.problems or (one_line(error),)]


def _check_recipe(config: ResolvedConfig) -> None:
    recipe = recipe_of(config)
    tuned = config.data.sft or config.model.num_classes is not None
    if config.sparsity.freeze_masks and not recipe.has_mask and not tuned:
        raise ConfigError(
            f"freeze_masks: the recipe {recipe.name} has no masks, expected ste, sr_ste, fst or ast"
        )


def _check_trackers(config: ResolvedConfig) -> None:
    for name, package in _TRACKERS.items():
        value = getattr(config.logging, name)
        if value and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{name} {value!r}: the package {package} is not installed; pip install {package}, "
                "or leave the flag out (TensorBoard files are always written)"
            )


def _check_tasks(config: ResolvedConfig) -> None:
    wanted = config.logging.eval_harness_tasks
    if wanted and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"eval_harness_tasks {' '.join(wanted)}: the package lm-eval is not installed; pip "
            "install lm-eval, or leave the flag out"
        )


def _check_save(config: ResolvedConfig) -> None:
    settings = config.checkpoint
    save = Path(settings.save)
    require_own_folders(config)
    if list_steps(save) and not settings.resume:
        raise ConfigError(
            f"save: {save} already holds checkpoints of a run; continue it with --resume, or "
            "choose another --run-dir"
        )
    wanted = settings.exit_on_missing_checkpoint and settings.resume and settings.load is None
    if wanted and not list_steps(save):
        raise CheckpointError(f"exit_on_missing_checkpoint: {save} holds no checkpoint")


def _check_load(config: ResolvedConfig) -> None:
    settings = config.checkpoint
    if settings.load is None:
        return
    settings.load = str(checkpoint_root(Path(settings.load)))
    if os.path.realpath(settings.load) == os.path.realpath(settings.save):
        raise ConfigError(f"finetune: load {settings.load} is the folder that this run saves to")
    if settings.load_hf is not None:
        raise ConfigError("load and load_hf are both set, expected one")
    if settings.resume and list_steps(Path(settings.save)):
        return
    if not Path(settings.load).is_dir():
        raise CheckpointError(f"load: {settings.load} is no folder; it holds no checkpoint")
    if not list_steps(Path(settings.load)):
        raise CheckpointError(f"load: {settings.load} holds no checkpoint")


def _check_branch(config: ResolvedConfig) -> None:
    settings = config.checkpoint
    if settings.branch_from is None:
        return
    folder = Path(settings.branch_from)
    if not (folder / MANIFEST).is_file():
        folder = checkpoint_root(folder)
        settings.branch_from = str(folder)
    if os.path.realpath(folder) == os.path.realpath(settings.save):
        raise ConfigError(
            f"branch_from: {folder} is the folder that this run saves to, expected another "
            "--run-dir (--resume continues a run)"
        )
    if settings.resume and list_steps(Path(settings.save)):
        return
    if not (folder / MANIFEST).is_file() and not (folder.is_dir() and list_steps(folder)):
        raise CheckpointError(f"branch_from: {folder} holds no checkpoint")


def _check_load_hf(config: ResolvedConfig) -> None:
    folder = config.checkpoint.load_hf
    if folder is not None and not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"load_hf: {folder} holds no config.json of a model")


def require_own_folders(config: ResolvedConfig) -> None:
    """Refuse folders that another run writes into; for ranks of the run that does, nothing.

    Raises:
        StorageError: names the other run.
    """
    rank = int(os.environ.get("RANK", "0"))

    def ours(owner: dict[str, Any]) -> bool:
        if rank == 0:  # a supervisor has the lock for its child
            return is_supervised() and owner.get("pid") == os.getppid()
        return is_same_launch(owner)

    settings = config.checkpoint
    require_free([Path(settings.run_dir), Path(settings.save)], ours)


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
    wanted.teacher_load = str(checkpoint_root(Path(wanted.teacher_load)))
    if not list_steps(Path(wanted.teacher_load)):
        raise CheckpointError(f"teacher_load: {wanted.teacher_load} holds no checkpoint")
