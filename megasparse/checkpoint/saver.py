"""The protocol of a save: snapshot, write, read back, agree, publish, prune.

    every rank   writes its file into `step-N.tmp-RUN`, syncs it, reads it back
    all ranks    say whether they could; one failure and nothing is published
    rank 0       manifest, one rename, pointer; then deletes what `keep_last` gives up

With `async_save` a thread writes a copy in host memory while training goes on, and the agreement
takes place at the first step boundary at which all ranks have finished. No thread communicates.
"""

from __future__ import annotations

import copy
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasparse.atomic_files import check_free_space
from megasparse.checkpoint import directory
from megasparse.checkpoint.manifest import encode_manifest
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.writer import (
    Hook,
    Tensors,
    byte_size,
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
        self.saved_step: int | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank's background writer is still at work."""
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
        if self._async and not final:
            # Daemon: a run that dies of something else does not wait for its disk.
            self._job.thread = threading.Thread(
                target=self._write, args=(self._job,), name="save", daemon=True
            )
            self._job.thread.start()
        else:
            self._write(self._job)
            self.finish(final)

    def finish(self, final: bool = False) -> None:
        """Wait for a save that has begun, and publish it; all ranks together.

        Raises:
            CheckpointError: on every rank, as `save`.
        """
        job, self._job = self._job, None
        if job is None:
            return
        if job.thread is not None:
            job.thread.join()
        try:
            self._publish(job)
        except CheckpointError as error:
            self._failed(error, final)
            return
        self._failures = 0
        self.saved_step = job.step

    def _begin(self, step: int, tensors: Tensors, meta: dict[str, Any]) -> _Job:
        """Check the room, make the temporary folder, and take a copy if training goes on."""
        self._hook("save:begin")
        name = f"{directory.step_folder(self._root, step).name}.tmp-{self._run_id}"
        temporary = self._root / name
        needed = sum(self._control.gather(byte_size(tensors)))
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
            record = write_rank_file(
                job.temporary, self._control.rank, job.tensors, binding, self._hook
            )
            _read_back(job.temporary, record)
            job.answer = {"record": record}
        except Exception as error:  # any: `_publish` raises it on all ranks
            job.answer = {"error": one_line(error)}

    def _publish(self, job: _Job) -> None:
        answers = self._control.gather(job.answer)
        failures = [
            f"rank {rank}: {answer['error']}"
            for rank, answer in enumerate(answers)
            if "error" in answer
        ]
        records = [answer.get("record") for answer in answers]

        def commit() -> None:
            if failures:
                shutil.rmtree(job.temporary, ignore_errors=True)
                raise StorageError(f"{job.temporary.name}: {'; '.join(failures)}")
            final = directory.step_folder(self._root, job.step)
            publish(job.temporary, final, records, job.meta, self._hook)
            self._hook("save:pointer")
            directory.write_pointer(self._root, job.step)
            # Older checkpoints go only when this one can be read.
            CheckpointReader(final, verify=False)
            self._hook("save:prune")
            directory.prune(self._root, job.step, self._keep_last, self._retain)
            logger.info("saved %s", final)

        self._control.on_rank_zero(commit)

    def _failed(self, error: CheckpointError, final: bool) -> None:
        self._failures += 1
        if final or self._failures > self._allowed_failures:
            raise error
        if self._control.rank == 0:
            logger.warning("save failed (%d in a row), training goes on: %s", self._failures, error)


def _read_back(folder: Path, record: dict[str, Any]) -> None:
    """Verify a file just written, before anything relies on it."""
    reader = CheckpointReader.of_files(folder, [record])
    reader.verify(reader.files)


def manifest_digest(reader: CheckpointReader) -> str:
    """The end of the encoded manifest, with its digest; equal for readers of one checkpoint."""
    meta = {key: value for key, value in reader.meta.items() if key != "format"}
    return encode_manifest(meta)[-70:].decode()


def choose(root: Path, control: ControlPlane) -> CheckpointReader | None:
    """The newest checkpoint whose every byte is as written, the same on all ranks.

    The files are shared out among the ranks for verification; what one finds damaged, none takes.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    steps = control.on_rank_zero(lambda: directory.list_steps(root))
    for step in steps:
        reader: CheckpointReader | None = None
        answer = {}
        try:
            reader = CheckpointReader(directory.step_folder(root, step), verify=False)
            reader.verify(reader.files[control.rank :: control.world])
            answer["digest"] = manifest_digest(reader)
        except CheckpointError as error:
            answer["error"] = one_line(error)
        answers = control.gather(answer)
        errors = [other["error"] for other in answers if "error" in other]
        if not errors and any(other != answers[0] for other in answers):
            errors = [f"{directory.step_folder(root, step)}: ranks read different manifests"]
        if not errors:
            _look_at_pointer(root, step, control)
            return reader
        if control.rank == 0:
            logger.warning("%s; trying the checkpoint before it", errors[0])
    if steps:
        raise CheckpointError(f"{root}: none of its {len(steps)} checkpoints is intact")
    return None


def _look_at_pointer(root: Path, step: int, control: ControlPlane) -> None:
    if control.rank == 0 and directory.read_pointer(root) != step:
        logger.warning(
            "%s does not name step %d, the newest intact checkpoint; it is only a hint",
            root / directory.POINTER,
            step,
        )
