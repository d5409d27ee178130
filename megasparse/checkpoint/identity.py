"""Which checkpoint a folder holds: what its manifest says, not what the folder is called.

A folder can be renamed, copied, or brought from another run. Here manifests are only looked at, to
put folders in order; whoever loads one verifies it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.checkpoint.manifest import FORMAT, MANIFEST, MAX_MANIFEST_BYTES
from megasparse.input_files import read_regular

POINTER = "latest.json"
STEP = re.compile(r"step-(\d{8,})")
_RUN_DIGITS = 16


@dataclass(frozen=True)
class Entry:
    """A folder among the checkpoints of a run.

    Attributes:
        name: of the folder.
        step: by its manifest, or by its name if the manifest cannot be read.
        run: that wrote it, see `run_of`; None: not known.
        format: of the manifest; None: it cannot be read.
        foreign: another run wrote it.
    """

    name: str
    step: int
    run: str | None
    format: int | None
    foreign: bool

    @property
    def is_newer(self) -> bool:
        """Whether a newer version wrote it, so that this one cannot judge it."""
        return self.format is not None and self.format > FORMAT

    @property
    def is_named_rightly(self) -> bool:
        """Whether the folder's name is that of its step."""
        match = STEP.fullmatch(self.name)
        return match is not None and int(match[1]) == self.step

    @property
    def is_own(self) -> bool:
        """Whether it is, as far as can be seen, what its name and its place say."""
        return self.is_named_rightly and not self.foreign and not self.is_newer


def run_of(run_id: Any) -> str | None:
    """The run, over all of its starts, that a manifest's `run_id` is of; None: it does not say."""
    known = isinstance(run_id, str) and re.fullmatch(r"[0-9a-f]{32}", run_id)
    return run_id[:_RUN_DIGITS] if known else None


def own_run(root: Path) -> str | None:
    """The run that a folder of checkpoints belongs to, by its pointer."""
    try:
        pointer = json.loads(read_regular(root / POINTER, 1 << 20))
        run, check = pointer["run"].split("-")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return run if checked(run) == f"{run}-{check}" else None


def checked(run: str) -> str:
    """A run's name with a checksum: a damaged pointer must not make all checkpoints foreign."""
    return f"{run}-{zlib.crc32(run.encode()):08x}"


def entries(root: Path) -> list[Entry]:
    """The published checkpoints of a folder, newest first; links are none."""
    if not root.is_dir():
        return []
    own, found = own_run(root), []
    for folder in root.iterdir():
        match = STEP.fullmatch(folder.name)
        if match is None or folder.is_symlink() or not folder.is_dir():
            continue
        said = _peek(folder / MANIFEST)
        run = run_of(said.get("run_id"))
        foreign = None not in (own, run) and own != run
        step = said.get("step", int(match[1]))
        found.append(Entry(folder.name, step, run, said.get("format"), foreign))
    return sorted(found, key=lambda e: (e.step, e.is_named_rightly, e.name), reverse=True)


def newest_step(root: Path) -> int:
    """Of the checkpoints that are the run's own, as far as can be seen; -1: none."""
    return max((entry.step for entry in entries(root) if not entry.foreign), default=-1)


def entry_at(folder: Path) -> Entry | None:
    """What a folder of checkpoints holds under one name."""
    return next((entry for entry in entries(folder.parent) if entry.name == folder.name), None)


def _peek(path: Path) -> dict[str, Any]:
    """Format, step and run of a manifest, unverified; what is of another type is left out."""
    try:
        status = os.lstat(path)
    except OSError:
        return {}
    return _said(path, status.st_mtime_ns, status.st_size, status.st_ino)


@functools.lru_cache(maxsize=256)
def _said(path: Path, *_: int) -> dict[str, Any]:
    try:
        manifest = json.loads(read_regular(path, MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(manifest, dict):
        return {}
    kinds = {"format": int, "step": int, "run_id": str}
    return {k: manifest[k] for k, kind in kinds.items() if type(manifest.get(k)) is kind}
