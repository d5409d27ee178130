"""A checked configuration to a finished run, with one clear line on every rank if it goes wrong."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from pathlib import Path

from megasparse.checkpoint.lock import RunLock
from megasparse.config import ResolvedConfig, gradient_accumulation_steps, to_dict
from megasparse.distributed import descriptors, faults
from megasparse.distributed.control_plane import ControlPlane, as_user_error, make_control_plane
from megasparse.distributed.environment import attempt
from megasparse.distributed.events import Events
from megasparse.distributed.signals import StoppedEarly, StopRequest
from megasparse.distributed.start_notes import Note, StartNotes
from megasparse.distributed.supervise import is_supervised
from megasparse.distributed.verdicts import is_communication_error
from megasparse.distributed.watchdog import Watchdog
from megasparse.errors import EXIT_PREEMPTED, ConfigError, MegasparseError, PeerError, one_line
from megasparse.log import logger
from megasparse.megatron.data.batches import build_data, is_lost_worker
from megasparse.megatron.grid import make_grid
from megasparse.preflight.check import check_hosts, require_fit
from megasparse.preflight.settings import Prepared, check, require_own_folders
from megasparse.train.engine.deepspeed import fix_order_of_sums, start_process, stop_process
from megasparse.train.first_step import FirstStepBar
from megasparse.train.loop import RunServices, Trainer
from megasparse.train.precision import settle_fp8


def pretrain(config: ResolvedConfig) -> int:
    """Run a configuration to its end on this rank; its exit code."""
    return _Run(check(config), StopRequest()).run()


def main(prepared: Prepared, stop: StopRequest, notes: StartNotes | None = None) -> int:
    """Run to the end; the exit code of this rank, after one line of what went wrong.

    Args:
        notes: between ranks that have not met yet.
    """
    run = _Run(prepared, stop, notes)
    try:
        code = run.run()
        stop_process()
        return code
    except StoppedEarly as error:
        logger.warning("%s", error)
        run.leave_note(f"another rank was {error}", EXIT_PREEMPTED)
        return EXIT_PREEMPTED
    except _NoMeeting as error:
        logger.log(error.level, "%s", error)
        return error.exit_code
    except MegasparseError as error:
        return run.failed(f"{type(error).__name__}: {one_line(error)}", error.exit_code)
    except OSError as error:
        if descriptors.is_exhausted(error):
            return run.failed(*_too_few_files())
        return run.failed(f"StorageError: {one_line(error)}", as_user_error(error).exit_code)
    except Exception as error:
        text = traceback.format_exc()
        if descriptors.is_exhausted(error):
            return run.failed(*_too_few_files())
        if is_lost_worker(error):
            # Killed from outside, most often for want of memory: another start may do better.
            message = f"PeerError: a data worker (--num-workers) was lost: {one_line(error)}"
            return run.failed(message, PeerError.exit_code)
        if is_communication_error(error):
            verdict = run.watch.explain() if run.watch is not None else None
            if verdict is not None:
                logger.error("PeerError: %s", verdict.message)
                return verdict.exit_code
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # after the watch has ended
                message = f"PeerError: the connection to the other ranks broke: {one_line(error)}"
                return run.failed(message, PeerError.exit_code)
        logger.error("unexpected error, a bug\n%s", text)
        return run.failed(f"{type(error).__name__}: {one_line(error)}", 1)


def _too_few_files() -> tuple[str, int]:
    """Line and exit code of a process that can open no more files."""
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return f"ConfigError: {descriptors.message(rank, world)}", ConfigError.exit_code


class _NoMeeting(Exception):
    """Another rank cannot come to the meeting of all ranks; it has left a note."""

    def __init__(self, note: Note) -> None:
        stopped = note["code"] == EXIT_PREEMPTED
        failed = f"PeerError: rank {note['rank']} failed: {note['message']}"
        super().__init__(note["message"] if stopped else failed)
        self.exit_code: int = note["code"]
        self.level = logging.WARNING if stopped else logging.ERROR


class _Run:
    """One run on this rank, from the process group to the last step."""

    def __init__(
        self, prepared: Prepared, stop: StopRequest, notes: StartNotes | None = None
    ) -> None:
        self._prepared, self._stop, self._notes = prepared, stop, notes
        self._lock: RunLock | None = None
        self._looked = 0.0
        self.watch: Watchdog | None = None

    def run(self) -> int:
        """Train with the run's folders to itself; leaves no lock, however it ends."""
        settings = self._prepared.config.checkpoint
        if os.environ.get("RANK", "0") == "0" and not is_supervised():
            self._lock = RunLock([Path(settings.run_dir), Path(settings.save)])
        try:
            return self._run()
        finally:
            if self.watch is not None and self.watch.is_alone:
                self.watch.stop()
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _run(self) -> int:
        config = self._prepared.config
        parallel = config.parallel
        if config.train.deterministic_mode:
            fix_order_of_sums()
        device = start_process(
            parallel.distributed_timeout_minutes,
            self._begin_watch,
            self._waiting,
            parallel.listen_on_all_interfaces,
        )
        assert self.watch is not None
        config = settle_fp8(config, device)
        control = make_control_plane()
        _check_same_config(config, control)
        if parallel.preflight != "off":
            full = parallel.preflight == "full"
            require_fit(check_hosts(config, self._prepared.data, control, full))
        grid = make_grid(
            parallel.tensor_model_parallel_size,
            device,
            config.train.seed,
            parallel.distributed_timeout_minutes,
            parallel.pipeline_model_parallel_size,
            parallel.expert_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
        )
        injected = faults.from_environment(int(os.environ["RANK"]))
        shown = FirstStepBar(gradient_accumulation_steps(config, grid.world))
        events = Events(self.watch.passed, injected.passed, shown)
        own = self._lock.check if self._lock is not None else lambda: None
        services = RunServices(control, self._stop, events, injected, own)
        events("build")
        events("index")
        with_data = build_data(config, grid, self._prepared.data)
        code = Trainer(config, grid, with_data, services).run()
        events("end")
        control.barrier()  # with the watchdog: a rank that hangs in its report is named
        self.watch.stop()
        control.barrier()  # nobody leaves before all have arrived: rank 0 keeps the store
        return code

    def _begin_watch(self, address: tuple[str, int] | None) -> None:
        if self._notes is not None:
            self._notes.close()
        config = self._prepared.config
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        folder = Path(config.checkpoint.run_dir)
        self.watch = Watchdog(address, attempt(), rank, world, config.parallel.hang_timeout, folder)
        self.watch.before_end = self._release
        if world == 1:
            self.watch.watch_alone()

    def _waiting(self) -> None:
        """While this rank waits for the others to come: is there a reason why they do not?

        Raises:
            StoppedEarly: a signal.
            StorageError: another run has the folders; its ranks will not come here.
            _NoMeeting: one has left a note.
        """
        self._stop.raise_if_asked()
        if self._notes is None or time.monotonic() - self._looked < 1.0:
            return
        self._looked = time.monotonic()
        if self._lock is None and self._notes.leads:
            require_own_folders(self._prepared.config)
        note = self._notes.find()
        if note is not None:
            raise _NoMeeting(note)

    def leave_note(self, message: str, exit_code: int) -> None:
        """Tell ranks that wait for this one at the meeting why it does not come."""
        if self.watch is None and self._notes is not None:
            self._notes.leave(message, exit_code)

    def failed(self, message: str, exit_code: int) -> int:
        """Log why this rank ends, and record it for the other ranks; returns the exit code."""
        logger.error("%s", message)
        self.leave_note(message, exit_code)
        if self.watch is not None:
            self.watch.fail(message, exit_code)
        return exit_code


def _check_same_config(config: ResolvedConfig, control: ControlPlane) -> None:
    """Ranks started with different flags would train different models, or wait for ever."""
    mine = json.loads(json.dumps(to_dict(config)))
    expected = control.broadcast(mine)
    differences = (
        f"{name} is {expected[group][name]!r} on rank 0 and {value!r} on rank {control.rank}"
        for group, fields in mine.items()
        for name, value in fields.items()
        if expected[group][name] != value
    )
    found = control.first(next(differences, None))
    if found is not None:
        raise ConfigError(f"{found}; all ranks need the same configuration")
