"""Whole runs that are killed, stopped by signals or cut off, against the undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.saver import choose
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import EXIT_PREEMPTED
from megasparse.metrics.schema import read_metrics
from tests import forked
from tests.runs import TINY

# Dropout and MVUE (FST's) on: everything random that a resume has to repeat.
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
EXACT = ("step", "loss", "grad_norm", "lr", "samples", "flip_rate", "density", "valid_loss")


def flags(data: str, run_dir: Path, *more: str) -> list[str]:
    """A tiny run with everything random in it."""
    # A rank that is killed before all have met is missed after the time limit alone.
    return [
        *TINY,
        *DROPOUT,
        "--data-path",
        data,
        "--run-dir",
        str(run_dir),
        "--distributed-timeout-minutes",
        "0.25",
        *more,
    ]


def differences(run_dir: Path, reference: Path) -> list[str]:
    """Where two finished runs differ in a record or a bit of the last checkpoint."""
    found = []
    rows, expected = (read_metrics(d / "metrics.jsonl") for d in (run_dir, reference))
    if len(rows) != len(expected):
        found.append(f"{len(rows)} records, expected {len(expected)}")
    for row, other in zip(rows, expected, strict=False):
        found += [f"step {other['step']}: {k}" for k in EXACT if row.get(k) != other.get(k)]
    readers = [choose(d / "checkpoints", ControlPlane(None)) for d in (run_dir, reference)]
    if None in readers or readers[0].keys() != readers[1].keys():
        return [*found, "other tensors"]
    found += [
        key
        for key in readers[0].keys()  # noqa: SIM118 (a method of the reader)
        if not torch.equal(readers[0].read(key), readers[1].read(key))
    ]
    for name in ("state", "consumed_samples", "optimizer_steps", "step"):
        if readers[0].meta[name] != readers[1].meta[name]:
            found.append(name)
    return found


def disturb(
    run_flags: list[str],
    world: int,
    log: Path,
    strike: Any,
    limit: int,
    seed: int,
) -> dict[str, Any]:
    """Start a run again and again, striking each start at a random instant, until it is done.

    Args:
        strike: called with the ranks and a random generator; disturbs them.
        limit: strikes; after that the run is left alone.

    Returns:
        strikes that met a running rank; exit codes seen; the longest time in seconds from the
        strike to the end of all ranks.
    """
    generator = random.Random(seed)
    result: dict[str, Any] = {"strikes": 0, "codes": {}, "longest": 0.0, "starts": 0}
    while True:
        place = Path(f"{log}.{result['starts']}")
        ranks = forked.start([*run_flags, "--resume"], world, place)
        result["starts"] += 1
        while not all(Path(f"{place}.{rank}").exists() for rank in range(world)):
            time.sleep(0.005)  # before that a rank is no run yet
        struck = False
        if result["strikes"] < limit:
            time.sleep(generator.uniform(0.02, 1.0))
            if all(rank.is_alive() for rank in ranks):
                begin = time.monotonic()
                strike(ranks, generator)
                struck = True
        codes = forked.wait(ranks)
        for code in codes:
            result["codes"][code] = result["codes"].get(code, 0) + 1
        if struck and codes != [0] * world:
            result["strikes"] += 1
            result["longest"] = max(result["longest"], round(time.monotonic() - begin, 2))
        if codes == [0] * world:
            return result
        assert struck and None not in codes, (codes, place)


def kill_any(ranks: list[Any], generator: random.Random) -> None:
    """SIGKILL for one rank; the others have to notice."""
    generator.choice(ranks).kill()


def terminate(ranks: list[Any], generator: random.Random) -> None:
    """A signal that asks to stop, to one rank or to all."""
    number = generator.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    chosen = ranks if generator.random() < 0.5 else [generator.choice(ranks)]
    for rank in chosen:
        if rank.is_alive():
            os.kill(rank.pid, number)


def soak(
    data: str, root: Path, world: int, strikes: int, strike: Any, seed: int, *more: str
) -> dict[str, Any]:
    """Runs struck `strikes` times in all; each must end equal to the undisturbed one."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    reference = root / "reference"
    codes = forked.run(flags(data, reference, *more), world, root / "reference.log")
    assert codes == [0] * world, codes
    total: dict[str, Any] = {"strikes": 0, "starts": 0, "runs": 0, "longest": 0.0, "codes": {}}
    total["differences"] = []
    while total["strikes"] < strikes:
        run_dir = root / f"run-{total['runs']}"
        result = disturb(
            flags(data, run_dir, *more),
            world,
            root / f"run-{total['runs']}.log",
            strike,
            strikes - total["strikes"],
            seed + total["runs"],
        )
        total["runs"] += 1
        total["differences"] += differences(run_dir, reference)
        total["longest"] = max(total["longest"], result["longest"])
        for name in ("strikes", "starts"):
            total[name] += result[name]
        for code, count in result["codes"].items():
            total["codes"][code] = total["codes"].get(code, 0) + count
        shutil.rmtree(run_dir)
    return total


def resume_at(data: str, root: Path, step: int, world: int, *more: str) -> list[str]:
    """Cut a run off after a step, continue it, and compare with `root/reference`."""
    run_dir = root / f"cut-{step}"
    base = flags(data, run_dir, *more)
    codes = forked.run([*base, "--exit-interval", str(step)], world, root / "cut.log")
    assert codes == [EXIT_PREEMPTED] * world, codes
    codes = forked.run([*base, "--resume"], world, root / "cut.log")
    assert codes == [0] * world, codes
    found = differences(run_dir, root / "reference")
    shutil.rmtree(run_dir)
    return found
