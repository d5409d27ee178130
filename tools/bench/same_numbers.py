"""Are two runs the same, bit for bit: every row of metrics.jsonl but its times, every tensor saved?

    python -m tools.bench.same_numbers runs/before runs/after

Exit code 0 when they are, 1 with the first differences when they are not. A change that must not
change numbers is checked with it, on the CPU run of `make quickstart`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.directory import list_steps, step_folder
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.metrics.schema import read_metrics

# Columns that the clock or the machine decides.
TIMED = ("tokens_per_second", "tflops", "mfu", "memory", "time_", "seconds")


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two run folders, one line each."""
    rows = [
        [_untimed(row) for row in read_metrics(run / "metrics.jsonl")] for run in (before, after)
    ]
    found = [f"{len(rows[0])} rows of metrics before, {len(rows[1])} after"]
    found = found if len(rows[0]) != len(rows[1]) else []
    for old, new in zip(*rows):
        keys = sorted(old.keys() | new.keys())
        found += [
            f"step {old['step']}: {key}: {old.get(key)!r} before, {new.get(key)!r} after"
            for key in keys
            if old.get(key) != new.get(key)
        ]
    readers = [_newest(run) for run in (before, after)]
    keys = sorted(set(readers[0].keys()) | set(readers[1].keys()))
    for key in keys:
        if any(key not in reader for reader in readers):
            found.append(f"{key}: saved by one of the runs only")
        elif not _equal(*(reader.read(key) for reader in readers)):
            found.append(f"{key}: other values")
    return found


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="folder of a run")
    parser.add_argument("after", type=Path, help="folder of another")
    arguments = parser.parse_args()
    found = differences(arguments.before, arguments.after)
    for line in found[:20]:
        print(line)
    if len(found) > 20:
        print(f"... and {len(found) - 20} more")
    if not found:
        count = len(_newest(arguments.after).keys())
        steps = len(read_metrics(arguments.after / "metrics.jsonl"))
        print(f"the same bits: {steps} rows of metrics, {count} tensors")
    return bool(found)


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(TIMED)}


def _newest(run: Path) -> CheckpointReader:
    root = run / "checkpoints"
    return CheckpointReader(step_folder(root, max(list_steps(root))))


def _equal(old: torch.Tensor, new: torch.Tensor) -> bool:
    return old.dtype == new.dtype and torch.equal(old, new)


if __name__ == "__main__":
    sys.exit(main())
