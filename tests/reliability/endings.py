"""How runs end: suspension, hangs, folders with wrong names.

Each function tries one of these many times and gives counts, for `tools.bench.soak`.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megasparse.checkpoint.identity import run_of
from megasparse.checkpoint.saver import Saver, choose_and_tell
from megasparse.distributed.control_plane import ControlPlane
from megasparse.metrics.schema import read_metrics
from tests import forked
from tests.checkpoint.saves import META, check_content, tensors_of
from tests.reliability.runs import flags
from tests.reliability.scripts import wait_for

# Where a run can hang: points of `distributed.faults`.
HANGS = (
    "build", "index", "model", "load", "data", "forward", "backward", "optimizer", "step_end",
    "evaluate", "save:begin", "save:file", "save:sync", "save:rename", "report",
)  # fmt: skip


def suspensions(data: str, root: Path, count: int, seconds: float, seed: int) -> dict[str, Any]:
    """All ranks of runs stopped for some time, at random instants, then continued: all end well."""
    generator = random.Random(seed)
    result: dict[str, Any] = {"suspensions": 0, "seconds_each": seconds, "codes": Counter()}
    while result["suspensions"] < count:
        group = []
        for number in range(min(4, count - result["suspensions"])):
            place = root / f"run-{result['suspensions'] + number}"
            run = flags(data, place, "--train-iters", "60", "--save-interval", "10")
            run += ["--distributed-timeout-minutes", "10"]
            world = 1 + number % 2
            ranks = forked.start(run, world, Path(f"{place}.log"))
            wait_for(lambda p=place: read_metrics(p / "metrics.jsonl"))  # type: ignore[misc]
            time.sleep(generator.uniform(0.0, 0.5))
            for rank in ranks:
                if rank.pid and rank.is_alive():
                    os.kill(rank.pid, signal.SIGSTOP)
            group.append(ranks)
        time.sleep(seconds)
        for ranks in group:
            for rank in ranks:
                if rank.pid and rank.is_alive():
                    os.kill(rank.pid, signal.SIGCONT)
                    time.sleep(generator.uniform(0.0, 1.0))  # not all at the same moment
        for ranks in group:
            result["codes"].update(forked.wait(ranks))
            result["suspensions"] += 1
    return {**result, "codes": dict(result["codes"])}


def hangs(data: str, root: Path, count: int, seed: int) -> dict[str, Any]:
    """A rank that hangs at each phase, in runs of one rank and of two: found and named."""
    result: dict[str, Any] = {"hangs": 0, "unnamed": [], "seconds": {}}
    limit = 1.0
    cases = [(point, world) for point in HANGS for world in (1, 2)]
    for number, (point, world) in enumerate(itertools.islice(itertools.cycle(cases), count)):
        place = root / f"run-{number}"
        more = [
            "--eval-iters",
            "1",
            "--eval-interval",
            "3",
            "--save-interval",
            "4",
            "--train-iters",
            "6",
        ]
        run = flags(data, place, "--hang-timeout", str(limit), *more)
        if point == "load":
            forked.run([*run, "--exit-interval", "2"], world, Path(f"{place}.before"))
            run.append("--resume")
        step = {"evaluate": "3"}.get(point, "4" if point.startswith("save") else "*")
        begin = time.monotonic()
        fault = {"MEGASPARSE_FAULT": f"hang@{world - 1}:{step}:{point}"}
        if point == "save:rename":
            fault = {"MEGASPARSE_FAULT": f"hang@0:{step}:{point}"}
        if point == "index":
            fault = {"MEGASPARSE_FAULT": f"hang@0:*:{point}"}
        codes = forked.wait(forked.start(run, world, Path(f"{place}.log"), fault), 180)
        text = "".join(Path(f"{place}.log.{rank}").read_text() for rank in range(world))
        if set(codes) != {71} or "hangs in " not in text:
            result["unnamed"].append(f"{point}, {world} ranks: {codes}")
        result["hangs"] += 1
        result["seconds"][point] = round(time.monotonic() - begin)
    return result


def renamed(root: Path, count: int, seed: int) -> dict[str, Any]:
    """Folders of checkpoints renamed, copied and swapped, also with another run's."""
    generator = random.Random(seed)
    alone, runs = ControlPlane(None), ("a" * 16, "b" * 16)

    def make(folder: Path, run: str) -> None:
        folder.mkdir(parents=True)
        saver = Saver(folder, alone, run + os.urandom(8).hex(), 0)
        for step in range(1, 6):
            saver.save(step, tensors_of(step), META)

    make(root / "other", runs[1])
    make(root / "base", runs[0])
    result: dict[str, Any] = {"folders": 0, "lost": 0, "set_aside": 0}
    while result["folders"] < count:
        folder = root / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "base", folder)
        for _ in range(generator.randint(1, 5)):
            result["folders"] += disturb(folder, root / "other", generator)
        names = sorted(folder.glob("step-*"))
        reader, damaged = choose_and_tell(folder, alone)
        good = reader is not None and reader.meta["step"] == 5
        result["lost"] += not (good and reader and run_of(reader.meta["run_id"]) == runs[0])
        result["set_aside"] += len(damaged) + (sorted(folder.glob("step-*")) != names)
        if reader is not None:
            check_content(reader)
    return result


def disturb(root: Path, other: Path, generator: random.Random) -> int:
    """Rename, copy or swap one folder of checkpoints; how many were."""
    source = generator.choice([*sorted(root.glob("step-*")), *sorted(other.glob("step-*"))])
    target = root / f"step-{generator.randint(1, 9):08d}"
    if not target.exists():
        rename = source.parent == root and generator.random() < 0.5
        (os.rename if rename else shutil.copytree)(source, target)
        return 1
    if source.parent != root or source == target:
        return 0
    swap = root / "swap"
    for old, new in ((source, swap), (target, source), (swap, target)):
        os.rename(old, new)
    return 2
