"""The folder of a run's checkpoints, from what an earlier start left to the report at the end."""

from __future__ import annotations

import secrets
from pathlib import Path

from megasparse.checkpoint.compatibility import check_same_run
from megasparse.checkpoint.directory import clean, make_private, set_aside
from megasparse.checkpoint.identity import own_run, run_of
from megasparse.checkpoint.manifest import MANIFEST
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import Saver, choose, choose_and_tell, open_together
from megasparse.checkpoint.writer import Hook
from megasparse.config import ResolvedConfig
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from megasparse.log import logger


class RunFolder:
    """The checkpoints of a run whose folders are its own (`RunLock`); a collective call.

    Raises:
        StorageError: on all ranks: nothing can be written.
    """

    def __init__(self, config: ResolvedConfig, control: ControlPlane) -> None:
        self._config, self._control = config, control
        self._root = Path(config.checkpoint.save)
        self._loaded: CheckpointReader | None = None
        control.on_rank_zero(self._take)

    def find_checkpoint(self, digests: dict[str, str]) -> CheckpointReader | None:
        """What the run starts from: nothing, or a verified checkpoint of the same run.

        With `resume` the newest intact one in `save`; else, or if there is none, that of
        `branch_from`, or that of `load`, unless only its weights are wanted (`finetune`, see
        `train/initial_weights.py`).

        Args:
            digests: of this run's data and tokenizer.

        Raises:
            CheckpointError: asked for, and none is intact.
            ConfigError: of another run.
        """
        settings, control = self._config.checkpoint, self._control
        reader = None
        if settings.resume:
            reader, damaged = choose_and_tell(self._root, control)
            if reader is not None:
                control.on_rank_zero(lambda: _set_aside(damaged))
        if reader is None and settings.load is not None and not settings.finetune:
            reader = choose(Path(settings.load), control)
            if reader is None:
                raise CheckpointError(f"load: {settings.load} holds no checkpoint")
        if reader is None and settings.branch_from is not None:
            reader = self._branch(Path(settings.branch_from))
        if reader is not None:
            check_same_run(reader, self._config, digests)
        self._loaded = reader
        return reader

    def _branch(self, folder: Path) -> CheckpointReader:
        """A checkpoint by its own folder, or the newest intact one of a run's."""
        if self._control.on_rank_zero(lambda: (folder / MANIFEST).is_file()):
            return open_together(folder, self._control)
        reader = choose(folder, self._control)
        if reader is None:
            raise CheckpointError(f"branch_from: {folder} holds no checkpoint")
        return reader

    def make_saver(self, hook: Hook) -> Saver:
        """The writer of this folder's checkpoints."""
        settings, control = self._config.checkpoint, self._control
        saver = Saver(
            self._root,
            control,
            control.on_rank_zero(self._run_id),
            keep_last=settings.keep_last,
            retain_interval=settings.save_retain_interval,
            async_save=settings.async_save,
            max_failed_saves=settings.max_failed_saves,
            hook=hook,
        )
        if self._loaded is not None and self._loaded.folder.parent == self._root:
            saver.saved_step = self._loaded.meta["step"]
        return saver

    def _take(self) -> None:
        """Rank 0: nothing half-written is left."""
        make_private(self._root)
        clean(self._root)

    def _run_id(self) -> str:
        """Rank 0: the run's name, the same over all of its starts, and this start's."""
        run = own_run(self._root)
        if run is None and self._loaded is not None and self._loaded.folder.parent == self._root:
            run = run_of(self._loaded.meta["run_id"])
        return (run or secrets.token_hex(8)) + secrets.token_hex(8)


def _set_aside(damaged: list[Path]) -> None:
    """Rank 0: newer checkpoints that failed verification must not be found again."""
    for folder in damaged:
        logger.warning("damaged, kept as %s", set_aside(folder))
