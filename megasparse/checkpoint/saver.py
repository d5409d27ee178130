"""The protocol of a save: snapshot, write, read back, agree, publish, prune.

    every rank   writes its file into `step-N.tmp-RUN`, syncs it, reads it back
    all ranks    tell rank 0 size and digest of their file, or why they have none
    rank 0       if all have: manifest, one rename, pointer; and tells the others
                 then deletes what `keep_last` gives up, while training goes on

With `async_save` threads write a copy in host memory and publish it while training goes on. The
ranks agree at the first step boundary at which all writers have finished, and again when rank 0 has
published. No thread communicates.
"""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megasparse.atomic_files import check_free_space
from megasparse.checkpoint import directory
from megasparse.checkpoint.identity import Entry, entries, run_of
from megasparse.checkpoint.manifest import MANIFEST, newer_format, read_manifest
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.writer import (
    Hook,
    Tensors,
    byte_size,
    bytes_shown,
    ignore,
    publish,
    write_rank_file,
)
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError, StorageError, one_line
from megasparse.log import logger


@dataclass
class _Job:
    """One save in progress on this rank."""

    step: int
    temporary: Path
    meta: dict[str, Any]
    tensors: Tensors
    answer: dict[str, Any] = field(default_factory=dict)
    thread: threading.Thread | None = None
    told: bool = False  # rank 0 has heard of all files
    failure: Exception | None = None  # of publishing, on rank 0


class Saver:
    """Writes the checkpoints of a run into one folder.

    Args:
        root: the folder; exists.
        control: of all ranks.
        run_id: hex, of this start of the run; part of the names of its temporary folders.
        keep_last: newest checkpoints to keep; 0: all.
        retain_interval: those of steps divisible by it are kept too.
        async_save: write in the background.
        max_failed_saves: saves in a row that may fail before the run ends.
        hook: called with the name of every point that a save passes (main or writer thread).
    """

    def __init__(
        self,
        root: Path,
        control: ControlPlane,
        run_id: str,
        keep_last: int = 2,
        retain_interval: int | None = None,
        async_save: bool = False,
        max_failed_saves: int = 0,
        hook: Hook = ignore,
    ) -> None:
        self._root, self._control, self._run_id = root, control, run_id
        self._keep_last, self._retain = keep_last, retain_interval
        self._async, self._hook = async_save, hook
        self._allowed_failures, self._failures = max_failed_saves, 0
        self._job: _Job | None = None
        self._pruner: threading.Thread | None = None
        self.saved_step: int | None = None

    @property
    def writing(self) -> bool:
        """Whether a background save is still at work on this rank."""
        return (
            self._job is not None and self._job.thread is not None and self._job.thread.is_alive()
        )

    @property
    def pending(self) -> bool:
        """Whether a save has begun that is not published; the same on all ranks."""
        return self._job is not None

    def save(self, step: int, tensors: Tensors, meta: dict[str, Any], final: bool = False) -> None:
        """Begin a save of the current state, and finish it unless it is asynchronous.

        Args:
            step: optimizer steps done.
            tensors: this rank's share.
            meta: what the manifest says besides; the same on all ranks.
            final: a failure is an error, however many are allowed.

        Raises:
            CheckpointError: on every rank; nothing was published, older checkpoints are intact.
        """
        self.finish()
        try:
            self._job = self._begin(step, tensors, meta)
        except CheckpointError as error:
            self._failed(error, final)
            return
        background = self._async and not final
        _run(self._job, self._write, background)
        while not background and self.pending:
            self._go_on(final, background=False)

    def advance(self) -> None:
        """Go on with a background save, once no rank is `writing`; all ranks together.

        Raises:
            CheckpointError: on every rank, as `save`.
        """
        if self.pending:
            self._go_on(final=False, background=True)

    def finish(self, final: bool = False) -> None:
        """Wait until a save that has begun is published and older ones are pruned; all ranks.

        Raises:
            CheckpointError: on every rank, as `save`.
        """
        while self.pending:
            self._go_on(final, background=False)
        if self._pruner is not None:
            self._pruner.join()
            self._pruner = None

    def _go_on(self, final: bool, background: bool) -> None:
        """The next part of a save: publish it, or tell all ranks how that went."""
        job = self._job
        assert job is not None
        if job.thread is not None:
            job.thread.join()
            job.thread = None
        if not job.told:
            answers = self._control.collect(job.answer)
            job.told = True
            if answers is not None:
                _run(job, lambda job: self._publish(job, answers), background)
            if background:
                return
        self._job = None
        try:
            self._control.on_rank_zero(lambda: _raise(job.failure))
        except CheckpointError as error:
            self._failed(error, final)
            return
        self._failures = 0
        self.saved_step = job.step
        if self._control.rank == 0:
            self._pruner = threading.Thread(
                target=self._prune, args=(job.step,), name="prune", daemon=True
            )
            self._pruner.start()

    def _begin(self, step: int, tensors: Tensors, meta: dict[str, Any]) -> _Job:
        """Check the room, make the temporary folder, and take a copy if training goes on."""
        self._hook("save:begin")
        name = f"{directory.step_folder(self._root, step).name}.tmp-{self._run_id}"
        temporary = self._root / name
        (needed,) = self._control.sum_over_ranks([byte_size(tensors)])
        needed += needed // 50 + (1 << 16)  # headers, manifest, blocks

        def prepare() -> None:
            directory.make_private(self._root)
            shutil.rmtree(temporary, ignore_errors=True)
            check_free_space(self._root, needed, StorageError, "a checkpoint")
            temporary.mkdir(mode=0o700)

        self._control.on_rank_zero(prepare)
        # A copy: the run goes on before the manifest is written.
        meta = {**copy.deepcopy(meta), "run_id": self._run_id, "step": step}
        if self._async:
            tensors = {
                entry: (piece, value.detach().to("cpu", copy=True))
                for entry, (piece, value) in tensors.items()
            }
        return _Job(step, temporary, meta, tensors)

    def _write(self, job: _Job) -> None:
        """Write this rank's file and read it back; never raises."""
        binding = {"run_id": self._run_id, "step": job.step}
        try:
            with bytes_shown(job.step, job.tensors, job.thread is None) as read:
                record = write_rank_file(
                    job.temporary, self._control.rank, job.tensors, binding, self._hook, read
                )
            # Verify what was just written, as readers will, before anything relies on it.
            CheckpointReader.of_files(job.temporary, record).verify(list(record))
            job.answer = {"files": record}
        except Exception as error:  # any: `_publish` makes it known to all ranks
            job.answer = {"error": one_line(error)}

    def _publish(self, job: _Job, answers: list[dict[str, Any]]) -> None:
        """Rank 0: give the checkpoint its name; never raises."""
        failures = [f"rank {n}: {a['error']}" for n, a in enumerate(answers) if "error" in a]
        try:
            if failures:
                shutil.rmtree(job.temporary, ignore_errors=True)
                more = f"; and {len(failures) - 4} more ranks" if len(failures) > 4 else ""
                raise StorageError(f"{job.temporary.name}: {'; '.join(failures[:4])}{more}")
            files = {name: entry for a in answers for name, entry in a["files"].items()}
            final = directory.step_folder(self._root, job.step)
            publish(job.temporary, final, files, job.meta, self._hook)
            self._hook("save:pointer")
            directory.write_pointer(self._root, job.step, run_of(self._run_id))
            logger.info("saved %s", final)
        except Exception as error:  # any: raised by the thread that trains
            job.failure = error

    def _prune(self, step: int) -> None:
        """Rank 0, in the background: delete what is too old, now that `step` can be read."""
        try:
            self._hook("save:prune")
            directory.prune(self._root, step, self._keep_last, self._retain)
        except OSError as error:
            logger.warning("old checkpoints stay: %s", one_line(error))

    def _failed(self, error: CheckpointError, final: bool) -> None:
        self._failures += 1
        if final or self._failures > self._allowed_failures:
            raise error
        if self._control.rank == 0:
            logger.warning("save failed (%d in a row), training goes on: %s", self._failures, error)


def _run(job: _Job, work: Callable[[_Job], None], background: bool) -> None:
    """A part of a save, now or in a thread."""
    if not background:
        work(job)
        return
    # Daemon: a run that dies of something else does not wait for its disk.
    job.thread = threading.Thread(target=work, args=(job,), name="save", daemon=True)
    job.thread.start()


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def open_together(folder: Path, control: ControlPlane) -> CheckpointReader:
    """A checkpoint whose every byte is as written; a collective call.

    Rank 0 reads the manifest for all. The files are shared out among the ranks for verification:
    with as many ranks as files each verifies its own, else ranks and files keep the same order.

    Raises:
        CheckpointError: on every rank: what the first rank that found damage says of it.
    """

    def read() -> str:
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: found a link, expected a folder")
        return read_manifest(folder / MANIFEST).decode("latin-1")  # any bytes, in JSON

    error: str | None = None
    content: str | None = None
    try:
        content = read() if control.rank == 0 else None
    except CheckpointError as problem:
        error = one_line(problem)
    content = control.broadcast(content)
    reader: CheckpointReader | None = None
    try:
        if content is not None:
            reader = CheckpointReader(folder, verify=False, manifest=content.encode("latin-1"))
            reader.verify(reader.share(control.rank, control.world))
    except CheckpointError as problem:
        error = one_line(problem)
    error = control.first(error)
    if error is not None:
        raise CheckpointError(error)
    assert reader is not None
    return reader


def choose(root: Path, control: ControlPlane) -> CheckpointReader | None:
    """The newest checkpoint whose every byte is as written, the same on all ranks.

    What one rank finds damaged, none takes. The manifests say which is the newest.

    Raises:
        CheckpointError: there are checkpoints, and none is an intact one of this run; or the newest
            was written by a newer version.
    """
    return choose_and_tell(root, control)[0]


def choose_and_tell(
    root: Path, control: ControlPlane
) -> tuple[CheckpointReader | None, list[Path]]:
    """As `choose`; and the folders that were newer and are damaged."""
    found = control.on_rank_zero(lambda: [asdict(entry) for entry in entries(root)])
    damaged: list[Path] = []
    for entry in (Entry(**fields) for fields in found):
        folder = root / entry.name
        if entry.is_newer:
            assert entry.format is not None
            raise CheckpointError(f"{folder}: {newer_format(entry.format)}")
        if entry.foreign:
            _warn(control, f"{folder}: passed over, another run wrote it (it is not damaged)")
            continue
        try:
            reader = open_together(folder, control)
        except CheckpointError as error:
            _warn(control, f"{error}; trying the checkpoint before it")
            damaged.append(folder)
            continue
        if not entry.is_named_rightly:
            _warn(control, f"{folder}: holds step {entry.step}: it was renamed or copied")
        _look_at_pointer(root, entry.step, control)
        return reader, damaged
    if found:
        raise CheckpointError(f"{root}: none of its {len(found)} checkpoints is intact")
    return None, []


def _warn(control: ControlPlane, line: str) -> None:
    if control.rank == 0:
        logger.warning("%s", line)


def _look_at_pointer(root: Path, step: int, control: ControlPlane) -> None:
    if control.rank == 0 and directory.read_pointer(root) != step:
        logger.warning(
            "%s does not name step %d, the newest intact checkpoint; it is only a hint",
            root / directory.POINTER,
            step,
        )
