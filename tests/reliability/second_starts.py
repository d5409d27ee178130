"""Second starts in the folders of a run that trains, saves, restarts, is suspended, or ends."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megasparse.checkpoint.identity import newest_step
from megasparse.metrics.schema import read_metrics
from tests.reliability.scripts import LONG, processes_of, ranks_of, start_script, wait_for
from tests.runs import TINY

# What the first run does meanwhile, and its flags for that.
FIRSTS = {
    "trains": [],
    "saves": ["--save-interval", "1"],
    "restarts": ["--max-restarts", "1000", "--max-restarts-without-progress", "1000"],
    "is suspended": ["--max-restarts", "2"],
}
AT_ONCE = 4  # second starts
OTHER = Path("other")


class _Starts:
    """Second starts against one first run, and what they came to."""

    def __init__(self, run: list[str], root: Path, generator: random.Random) -> None:
        self._run, self._root, self._generator = run, root, generator
        self._number = 0
        self.codes: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.longest = 0.0
        self.wrong: list[str] = []

    def together(self, owners: set[int], may_win: bool = False) -> list[subprocess.Popen]:
        """Some at once, until they have ended.

        Args:
            owners: the processes that a refusal may name.
            may_win: the first one ends: one of these may take its place, and stop at once.

        Returns:
            Their processes.
        """
        begin, started = time.monotonic(), []
        for _ in range(AT_ONCE):
            kind, command = self._kind(may_win)
            log = self._root / f"second-{self._number}"
            self._number += 1
            self.kinds[kind] += 1
            started.append((kind, log, start_script(command, log, before=_BEFORE.get(kind, ()))))
            time.sleep(self._generator.uniform(0.0, 0.2 if not may_win else 0.8))
        known = owners | {process.pid for _, _, process in started}
        for kind, log, process in started:
            code = process.wait(120)
            self.codes[code] += 1
            self._judge(kind, log.read_text(errors="replace"), code, known, may_win)
        self.longest = max(self.longest, round(time.monotonic() - begin, 1))
        return [process for _, _, process in started]

    def _kind(self, may_win: bool) -> tuple[str, list[str]]:
        """A second start's flags."""
        run, root = self._run, self._root
        other = str(root / OTHER)
        kinds = {
            "same": [*run, "--resume"],
            "not resumed": run,
            "supervised": [*run, "--resume", "--max-restarts", "3"],
            "another rate": [*run, "--resume", "--lr", "1"],
            "other save": [*run, "--resume", "--save", other],
            "other run-dir": [*run, "--save", f"{run[-1]}/checkpoints", "--run-dir", other],
            "other host": [*run, "--resume"],
            "by a link": [*run, "--resume", "--run-dir", str(root / "link")],
        }
        if may_win:
            return "same", [*run, "--resume", "--exit-interval", "1"]
        kind = self._generator.choice(list(kinds))
        return kind, kinds[kind]

    def _judge(self, kind: str, text: str, code: int, known: set[int], may_win: bool) -> None:
        if may_win and code == 75:
            return
        lines = [line for line in text.splitlines() if "Error" in line]
        owner = re.search(r"process (\d+) on ", lines[0]) if len(lines) == 1 else None
        good = code == 74 and owner and int(owner[1]) in known and "last seen" in lines[0]
        if not good or "Traceback" in text:
            self.wrong.append(f"{kind}: exit code {code}: {text[-400:]}")


_BEFORE = {"other host": ("-m", "tests.reliability.other_host")}


def second_starts(data: str, root: Path, count: int, seed: int) -> dict[str, Any]:
    """Second starts of all kinds, some at once; a fifth races with a first run's end.

    Returns:
        Counts by kind and by what the first did; exit codes; `wrong`: what broke a promise.
    """
    generator = random.Random(seed)
    result: dict[str, Any] = {"starts": 0, "wrong": [], "longest_seconds": 0.0, "first": {}}
    codes, kinds = Counter[int](), Counter[str]()
    shares = {doing: count * 4 // 5 // len(FIRSTS) for doing in FIRSTS}
    shares["ends"] = count - sum(shares.values())
    for doing, share in shares.items():
        place = root / doing.replace(" ", "-")
        place.mkdir()
        begin = _ends if doing == "ends" else _goes_on
        starts, firsts = begin(doing, data, place, share, generator)
        result["starts"] += sum(starts.codes.values())
        result["wrong"] += [f"{doing}: {line}" for line in starts.wrong]
        result["first"][doing] = dict(firsts)
        if doing != "ends":  # there a start may wait for its turn to train
            result["longest_seconds"] = max(result["longest_seconds"], starts.longest)
        codes, kinds = codes + starts.codes, kinds + starts.kinds
    return {**result, "codes": dict(codes), "kinds": dict(kinds)}


def _goes_on(
    doing: str, data: str, root: Path, count: int, generator: random.Random
) -> tuple[_Starts, Counter[int]]:
    """Second starts while one first run does one thing; then it is stopped."""
    run_dir, log = root / "run", root / "first"
    (root / "link").symlink_to(run_dir)
    run = [*TINY, "--data-path", data, "--run-dir", str(run_dir)]
    more = ["--save-interval", "5", *FIRSTS[doing]]
    first = start_script([*TINY, "--data-path", data, *LONG, *more, *run[-2:]], log)
    starts = _Starts([*LONG, *run], root, generator)
    try:
        wait_for(lambda: newest_step(run_dir / "checkpoints") > 0)
        while sum(starts.codes.values()) < count:
            with _meanwhile(doing, log, generator):
                if doing == "trains" and generator.random() < 0.2:
                    (run_dir / ".lock").unlink(missing_ok=True)
                    time.sleep(5.0)  # hosts that see no locks need the note, which is put back
                starts.together({first.pid})
            if first.poll() is not None:
                starts.wrong.append(f"the first has ended: {first.returncode}")
                break
        if (root / OTHER).exists() and any((root / OTHER).iterdir()):
            starts.wrong.append("a refused start has written into its other folder")
        # A first run that restarts may not have begun again.
        rows = len(read_metrics(run_dir / "metrics.jsonl"))
        wait_for(lambda: len(read_metrics(run_dir / "metrics.jsonl")) > rows)
        first.send_signal(signal.SIGTERM)
        code = first.wait(120)
        if code != 75:
            starts.wrong.append(f"the first run ended with {code}: {log.read_text()[-400:]}")
        starts.wrong += _damage(run_dir)
        return starts, Counter([code])
    finally:
        _kill(log, first)


@contextlib.contextmanager
def _meanwhile(doing: str, log: Path, generator: random.Random) -> Iterator[None]:
    """Have the first run restart, or suspended."""
    processes = processes_of(log)
    if doing == "restarts":
        for rank in ranks_of(log):
            os.kill(rank, signal.SIGKILL)
        time.sleep(generator.uniform(0.0, 4.0))
    if doing == "is suspended":
        for process in processes:
            os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        if doing == "is suspended":
            for process in processes:
                os.kill(process, signal.SIGCONT)


def _ends(
    doing: str, data: str, root: Path, count: int, generator: random.Random
) -> tuple[_Starts, Counter[int]]:
    """Second starts at once, at the moment at which a first run is told to end."""
    run_dir = root / "run"
    run = [*TINY, "--data-path", data, *LONG, "--run-dir", str(run_dir)]
    starts, ends = _Starts(run, root, generator), Counter[int]()
    while sum(starts.codes.values()) < count:
        log = root / f"first-{len(list(root.glob('first-*')))}"
        rows = len(read_metrics(run_dir / "metrics.jsonl"))
        first = start_script([*run, "--resume"], log)
        try:
            wait_for(lambda n=rows: len(read_metrics(run_dir / "metrics.jsonl")) > n)
            first.send_signal(signal.SIGTERM)
            starts.together({first.pid}, may_win=True)
            ends[first.wait(120)] += 1
            if first.returncode != 75:
                starts.wrong.append(f"the first run ended with {first.returncode}")
            starts.wrong += _damage(run_dir)
        finally:
            _kill(log, first)
    return starts, ends


def _damage(run_dir: Path) -> list[str]:
    """What is wrong with the folder of a run that has ended."""
    steps = [int(row["step"]) for row in read_metrics(run_dir / "metrics.jsonl")]
    found = []
    if steps != list(range(1, len(steps) + 1)):
        found.append(f"steps are missing or stand twice, of {len(steps)}")
    saved = newest_step(run_dir / "checkpoints")
    if saved != len(steps):
        found.append(f"trained to step {len(steps)}, saved {saved}")
    return found + [f"left {path.name}" for path in run_dir.rglob(".lock")]


def _kill(log: Path, process: subprocess.Popen) -> None:
    for pid in processes_of(log):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
