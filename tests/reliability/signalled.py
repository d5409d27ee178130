"""Signals to whole runs as users start them: which process, when, and how the run ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.checkpoint.identity import newest_step
from megasparse.metrics.schema import read_metrics
from tests.reliability.scripts import (
    LONG,
    handles,
    inner_launcher,
    processes_of,
    ranks_of,
    start_script,
    wait_for,
)
from tests.runs import TINY

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PLACES = {
    "deepspeed": ("rank", "group", "outer", "inner"),
    "torchrun": ("rank", "group", "outer"),
    "none": ("rank", "group"),
    "supervised": ("rank", "group", "outer"),
}
MOMENTS = ("launch", "start", "training")
# A launcher gives its ranks 30 s to save; the machine may do other work too.
END_SECONDS = 120.0


@dataclass(frozen=True)
class Trial:
    """One signal, or two.

    Attributes:
        launcher: "supervised" is a run without one, with `--max-restarts`.
        place: "outer" is what the user started; "inner" DeepSpeed's second process.
        moment: "launch" before there are ranks, "start" while they import, meet and build, from
            their first line on, "training" after the first step.
        delay: seconds after that moment has begun.
        twice: again 0.2 s later.
    """

    launcher: str
    place: str
    number: signal.Signals
    moment: str
    delay: float
    twice: bool


def trials(count: int, seed: int) -> list[Trial]:
    """A random choice in which launchers, moments and places come about equally often."""
    generator, found = random.Random(seed), []
    for n in range(count):
        launcher = list(PLACES)[n % len(PLACES)]
        moment = MOMENTS[n // len(PLACES) % len(MOMENTS)]
        if launcher in ("none", "supervised") and moment == "launch":
            moment = "start"
        places = [p for p in PLACES[launcher] if moment != "launch" or p != "rank"]
        # DeepSpeed's two processes import for seconds before there are ranks.
        longest = {"launch": 8.0, "start": 6.0, "training": 1.5}[moment]
        delay, twice = generator.uniform(0.0, longest), generator.random() < 0.2
        place, number = generator.choice(places), generator.choice(SIGNALS)
        found.append(Trial(launcher, place, number, moment, delay, twice))
    return found


def signals(
    data: str, root: Path, count: int, seed: int, skip: int = 0, jobs: int = 1
) -> dict[str, Any]:
    """Try them all, but for the first `skip`.

    Args:
        jobs: trials at once, each in a folder and on a port of its own.

    Returns:
        Counts by launcher, place and moment; seconds from the signal until no process is left
        (median and longest, by launcher); exit codes of what the user started; `wrong`: runs that
        broke a promise.
    """
    result: dict[str, Any] = {"signals": 0, "saved": 0, "lost_in_imports": 0, "wrong": []}
    tried, codes = Counter[str](), Counter[str]()
    seconds: dict[str, list[float]] = {launcher: [] for launcher in PLACES}
    context = multiprocessing.get_context("fork")
    # A fork begins with a seed of its own, by which it finds a free port.
    with ProcessPoolExecutor(jobs, context, initializer=random.seed) as pool:
        made = {
            pool.submit(attempt, trial, data, root / f"run-{n}"): (n, trial)
            for n, trial in list(enumerate(trials(count, seed)))[skip:]
        }
        for future in as_completed(made):
            n, trial = made[future]
            try:
                took, code, trained, lost, wrong = future.result()
            except TimeoutError as error:  # its moment did not come
                told = f"{n + 1} of {count}: {trial}: {error}"
                print(told, flush=True)
                result["wrong"].append(told)
                continue
            result["signals"] += 1 + trial.twice + lost
            result["lost_in_imports"] += lost
            result["saved"] += trained
            told = f"{n + 1} of {count}: {trial}: {took} s, exit code {code}"
            print(told, *wrong, flush=True)
            result["wrong"] += [told] if wrong else []
            tried.update((trial.launcher, trial.place, trial.moment))
            seconds[trial.launcher].append(took)
            codes[f"{trial.launcher} {trial.place} {trial.number.name} {code}"] += 1
    result["seconds"] = {
        launcher: {"median": statistics.median(found), "longest": max(found)}
        for launcher, found in seconds.items()
        if found
    }
    return {
        "runs": count - skip,
        **result,
        "tried": dict(tried),
        "codes": dict(sorted(codes.items())),
    }


def attempt(trial: Trial, data: str, root: Path) -> tuple[float, int, bool, bool, list[str]]:
    """One run, signalled.

    Returns:
        Seconds until all processes had ended, the exit code, whether there was a step to save,
        whether a launcher's imports swallowed the signal, and which promises were broken.
    """
    root.mkdir()
    run_dir, log = root / "run", root / "log"
    run = [*TINY, "--data-path", data, "--run-dir", str(run_dir), *LONG]
    alone = trial.launcher in ("none", "supervised")
    run += ["--max-restarts", "2"] if trial.launcher == "supervised" else []
    process = start_script(run, log, "none" if alone else trial.launcher)
    wrong = []
    try:
        _await(trial, log, run_dir, process)
        begin = time.monotonic()
        for _ in range(1 + trial.twice):
            _strike(trial, process.pid, log)
            time.sleep(0.2 * trial.twice)
        lost = _is_lost(trial, process, log)
        if lost:
            _strike(trial, process.pid, log)  # as a user does who sees that nothing happens
        try:
            wait_for(lambda: process.poll() is not None and not processes_of(log), END_SECONDS)
        except TimeoutError:
            wrong.append(f"still there after {END_SECONDS:.0f} s: {processes_of(log)}")
        took = round(time.monotonic() - begin, 1)
        steps = [int(row["step"]) for row in read_metrics(run_dir / "metrics.jsonl")]
        saved = newest_step(run_dir / "checkpoints")
        if steps and saved != steps[-1]:
            wrong.append(f"trained to step {steps[-1]}, saved {saved}")
        wrong += [f"left {path.name}" for path in run_dir.rglob(".lock")]
        text = log.read_text(errors="replace")
        # Launchers have tracebacks of their own.
        lines = [line for line in text.splitlines() if line.startswith("[rank ")]
        wrong += [line for line in lines if "] error: " in line or "a bug" in line]
        code = process.poll()
        if code not in expected_codes(trial):
            wrong.append(f"exit code {code}")
        if wrong:
            wrong.append(text[-600:])
        return took, -1000 if code is None else code, bool(steps), lost, wrong
    finally:
        for pid in processes_of(log):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(root, ignore_errors=True)


def expected_codes(trial: Trial) -> set[int]:
    """What the process that the user started may end with, as docs/reliability.md says."""
    number = int(trial.number)
    own = {-number, 128 + number}  # of a process that the signal ends: alone, or told by a parent
    if trial.launcher in ("none", "supervised"):
        return {75}
    if trial.launcher == "torchrun":
        # Its agent handles all but SIGUSR1, once it has imported itself.
        return {1} if trial.place == "rank" else {1, *own}
    if trial.place == "rank":
        return {75}
    if trial.place == "inner":
        return {0, 1, 75}  # 0: the outer process takes the death of the inner one for its end
    return {0, 1, 75, *own}


def _await(trial: Trial, log: Path, run_dir: Path, process: subprocess.Popen) -> None:
    """Until the moment of a trial has come.

    Raises:
        TimeoutError: it does not come, as when the run has ended by itself.
    """

    def wait(what: Callable[[], Any]) -> Any:
        def unless_ended() -> Any:
            if not (found := what()) and process.poll() is not None:
                text = log.read_text(errors="replace")[-600:]
                raise TimeoutError(f"ended by itself with {process.returncode}: {text}")
            return found

        return wait_for(unless_ended)

    if trial.moment == "launch":
        end = time.monotonic() + trial.delay
        if trial.place == "inner":
            wait(lambda: inner_launcher(log))
            end = time.monotonic() + trial.delay / 2
        while time.monotonic() < end and not ranks_of(log):
            time.sleep(0.02)
        return
    alone = trial.launcher in ("none", "supervised")
    ranks = wait(lambda: len(found := ranks_of(log)) == (1 if alone else 2) and found)
    wait(lambda: all(handles(rank, trial.number) for rank in ranks))
    if trial.moment == "training":
        wait(lambda: read_metrics(run_dir / "metrics.jsonl"))
    time.sleep(trial.delay)


def _is_lost(trial: Trial, process: subprocess.Popen, log: Path) -> bool:
    """Whether the launcher goes on after SIGINT: KeyboardInterrupt within torch's imports, where
    some `except` takes it for a library that is missing."""
    if trial.moment != "launch" or trial.number != signal.SIGINT:
        return False
    try:
        wait_for(lambda: process.poll() is not None and not processes_of(log), 20.0)
    except TimeoutError:
        return process.poll() is None
    return False


def _strike(trial: Trial, pid: int, log: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        if trial.place == "group":
            os.killpg(pid, trial.number)
        elif trial.place == "outer":
            os.kill(pid, trial.number)
        elif trial.place == "inner":
            if inner := inner_launcher(log):  # else the first signal has ended it
                os.kill(inner, trial.number)
        elif ranks := ranks_of(log):
            os.kill(random.choice(ranks), trial.number)
