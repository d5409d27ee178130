"""Runs of launch/pretrain.py, several at a time: each with a GPU and a log file of its own.

A queue without barriers: whenever a slot is free the next run begins in it, so that all GPUs are
busy to the end. A run that fails ends the queue once those under way have ended.
"""

from __future__ import annotations

import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from megasparse.checkpoint.directory import list_steps
from megasparse.errors import ConfigError, MegasparseError

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch" / "pretrain.py"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Task:
    """One run that is to be done.

    Attributes:
        kind: runs of a kind take about equally long.
        name: shown.
        folder: its --run-dir.
        arguments: of launch/pretrain.py.
        needs: a folder that another run makes, its checkpoint: not begun before it is there.
    """

    kind: str
    name: str
    folder: Path
    arguments: tuple[str, ...]
    needs: Path | None = None

    @property
    def log(self) -> Path:
        """What the run prints if others run beside it."""
        return self.folder.with_name(f"{self.folder.name}.log")


class Running(Protocol):
    """What the queue uses of a `subprocess.Popen`."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def wait(self) -> int: ...


# Begins a run: its arguments, what its environment has besides, and its log (None: the terminal).
Start = Callable[[Sequence[str], Mapping[str, str], Path | None], Running]


def start_process(
    arguments: Sequence[str],
    extra: Mapping[str, str],
    log: Path | None,
    launcher: str = "",
    program: Sequence[str] = (str(LAUNCH),),
) -> subprocess.Popen:
    """launch/pretrain.py, or another program, in a process of its own.

    Args:
        program: what Python runs: a file, or `-m` and a module.
        launcher: command that starts its ranks (`deepspeed --num_gpus 8`); default: one rank.
    """
    # Evaluations in this process have made it a rank of its own, which the run is not.
    own = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment = {"OMP_NUM_THREADS": "1", **environment, **extra}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), environment.get("PYTHONPATH")])
    )
    command = [*(shlex.split(launcher) or [sys.executable]), *program, *arguments]
    if log is None:
        return subprocess.Popen(command, env=environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as stream:
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and what stands after `--`: flags of its runs."""
    if "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def visible_gpus() -> list[str]:
    """How CUDA_VISIBLE_DEVICES names the GPUs that this process may use; none: no GPU."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return named[:count] if named[0] else [str(number) for number in range(count)]


def check_jobs(jobs: int, launcher: str, gpus: Sequence[str], share: bool = False) -> None:
    """Refuse several runs beside a launcher, and more than there are GPUs unless they `share` them.

    Raises:
        ConfigError: naming both.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}, expected at least 1")
    if jobs > 1 and launcher:
        raise ConfigError(f"--jobs {jobs} with --launcher {launcher!r}, which owns the GPUs")
    if gpus and jobs > len(gpus) and not share:
        raise ConfigError(
            f"--jobs {jobs}, expected at most {len(gpus)}, one a GPU, or --share-gpus where the "
            "tool has it"
        )


@dataclass
class _Slot:
    """A run under way."""

    task: Task
    process: Running
    began: float
    whole: bool


@dataclass
class RunQueue:
    """Runs tasks, `jobs` at a time.

    Attributes:
        start: begins one.
        jobs: runs at a time. With several each has one of `gpus` (if there are any), which they
            share if they are more, and a log.
        gpus: names for CUDA_VISIBLE_DEVICES.
        deadline: time.monotonic() by which runs are to end; None: no limit.
        stops: end what is under way at the deadline; it saves, and is not a failure.
        goes_on: begin the others although a run failed.
        seconds: how long whole runs took, by kind; those of earlier sessions may be given.
        say: tells what begins and ends.
    """

    start: Start
    jobs: int = 1
    gpus: Sequence[str] = ()
    deadline: float | None = None
    stops: bool = False
    goes_on: bool = False
    seconds: dict[str, list[float]] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: print(line, flush=True)

    def run(self, tasks: Sequence[Task], ended: Callable[[Task, float | None], None]) -> list[Task]:
        """All tasks in order, but those that would not end in time, or whose needs never come.

        Args:
            ended: called after each success, with its seconds if it ran from its first step.

        Returns:
            What was not begun, or was stopped.

        Raises:
            MegasparseError: a run failed, the first if there are several; has its exit code and
                names its log. Those under way have ended.
        """
        waiting, left, running = list(tasks), [], dict[int, _Slot]()
        failures: list[MegasparseError] = []
        with _ending(running):
            while running or (waiting and (self.goes_on or not failures)):
                for number in range(self.jobs):
                    ends = failures and not self.goes_on
                    while not ends and number not in running:
                        ready = (t for t in waiting if t.needs is None or t.needs.is_dir())
                        task = next(ready, None)
                        if task is None:
                            break
                        waiting.remove(task)
                        if self._fits(task):
                            running[number] = self._begin(task, number)
                        else:
                            left.append(task)
                if waiting and not running and (self.goes_on or not failures):
                    left, waiting = left + waiting, []  # what they need was not made
                failures += self._collect(running, ended)
                if self.stops and self.time_is_over():
                    left += self._stop(running)
                time.sleep(POLL_SECONDS if running else 0)
        if failures:
            raise failures[0]
        return left

    def shares(self) -> bool:
        """Whether runs share GPUs: their speeds are not those of a run alone."""
        return len(self.gpus) > 0 and self.jobs > len(self.gpus)

    def time_is_over(self) -> bool:
        """Whether nothing at all can begin any more."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _fits(self, task: Task) -> bool:
        """Whether the task would end in time: as the runs of its kind, else as the mean run."""
        known = self.seconds.get(task.kind) or [s for group in self.seconds.values() for s in group]
        if self.deadline is None or not known:
            return not self.time_is_over()
        return time.monotonic() + statistics.fmean(known) <= self.deadline

    def _begin(self, task: Task, number: int) -> _Slot:
        extra, log, where = {}, None, ""
        if self.jobs > 1:
            log, where = task.log, f" ({task.log})"
            if self.gpus:
                gpu = self.gpus[number % len(self.gpus)]
                extra["CUDA_VISIBLE_DEVICES"] = gpu
                where = f" on GPU {gpu}{where}"
        self.say(f"{task.name} ...{where}")
        whole = task.needs is None and not list_steps(task.folder / "checkpoints")
        return _Slot(task, self.start(task.arguments, extra, log), time.monotonic(), whole)

    def _collect(
        self, running: dict[int, _Slot], ended: Callable[[Task, float | None], None]
    ) -> list[MegasparseError]:
        """Take the slots whose runs have ended; an error for each that failed."""
        failures = []
        for number, slot in list(running.items()):
            code = slot.process.poll()
            if code is None:
                continue
            del running[number]
            seconds = time.monotonic() - slot.began
            log = f", see {slot.task.log}" if self.jobs > 1 else ""
            if code:
                message = f"{slot.task.name}: ended with exit code {code}{log}"
                self.say(f"{message}, after {seconds:.0f} s")
                failures.append(MegasparseError(message))
                failures[-1].exit_code = code if code > 0 else 128 - code
                continue
            self.say(f"{slot.task.name}: done in {seconds:.0f} s")
            if slot.whole:
                self.seconds.setdefault(slot.task.kind, []).append(seconds)
            ended(slot.task, seconds if slot.whole else None)
        return failures

    def _stop(self, running: dict[int, _Slot]) -> list[Task]:
        """End all that is under way and wait for it; what it was."""
        for slot in running.values():
            slot.process.terminate()
        stopped = []
        for slot in running.values():
            slot.process.wait()
            seconds = time.monotonic() - slot.began
            self.say(f"{slot.task.name}: stopped by the time limit after {seconds:.0f} s")
            stopped.append(slot.task)
        running.clear()
        return stopped


@contextmanager
def _ending(running: Mapping[int, _Slot]) -> Iterator[None]:
    """No run outlives this process: what ends it early ends them, and they save first."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, leave) if main else None
    try:
        yield
    except BaseException:
        for slot in running.values():
            slot.process.terminate()
        for slot in running.values():
            slot.process.wait()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
