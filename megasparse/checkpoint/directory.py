"""The folder of checkpoints: names, pointer, leftovers, retention. No tensor is touched here.

step-00000100              published: complete, by one rename
step-00000100.tmp-RUN      being written, or left by a writer that was killed
step-00000100.old-RUN      set aside while its successor of the same step takes its name
step-00000100.damaged-N    failed verification; kept to be looked at, never read again
step-00000100.kept-N       held another checkpoint than its name said when that name was needed
latest.json                a hint for people; readers scan and verify
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from megasparse.atomic_files import rename, sync_folder, temporaries_of, write_json
from megasparse.checkpoint.identity import POINTER, STEP, checked, entries
from megasparse.errors import StorageError
from megasparse.input_files import read_regular
from megasparse.log import logger

_LEFTOVER = re.compile(r"(step-\d{8,})\.(tmp|old)-[0-9a-f]+")


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step:08d}"


def list_steps(root: Path) -> list[int]:
    """Steps of the published checkpoints, newest first; links are none."""
    if not root.is_dir():
        return []
    matches = (
        STEP.fullmatch(entry.name)
        for entry in root.iterdir()
        if entry.is_dir() and not entry.is_symlink()
    )
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def checkpoint_root(path: Path) -> Path:
    """The folder that holds the checkpoints: itself, or `checkpoints/` in a run's folder."""
    inside = path / "checkpoints"
    return inside if not list_steps(path) and list_steps(inside) else path


def read_pointer(root: Path) -> int | None:
    """The step that `latest.json` names; None if it says nothing that can be read."""
    try:
        pointer = json.loads(read_regular(root / POINTER))
    except (OSError, ValueError, RecursionError):
        return None
    step = pointer.get("step") if isinstance(pointer, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def write_pointer(root: Path, step: int, run: str | None = None) -> None:
    """Name the newest checkpoint and the run (`identity.run_of`), by replacing the file."""
    pointer = {"step": step, "folder": step_folder(root, step).name}
    write_json(root / POINTER, pointer if run is None else {**pointer, "run": checked(run)})


def clean(root: Path) -> None:
    """Tidy up after interrupted writers; only for the holder of the folder's lock."""
    for entry in sorted(root.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or entry.is_symlink():
            continue
        if match[2] == "old" and not (root / match[1]).exists():
            logger.warning("%s: put back, its replacement was never finished", entry)
            os.rename(entry, root / match[1])
        else:
            logger.info("%s: removed, left by an interrupted save", entry)
            shutil.rmtree(entry, ignore_errors=True)
    for entry in (*temporaries_of(root / POINTER), *root.glob(".probe-*")):
        entry.unlink(missing_ok=True)
    sync_folder(root)


def set_aside(folder: Path, why: str = "damaged") -> Path:
    """Rename a folder so that no reader takes it for a checkpoint again."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}.{why}-{number}")).exists():
        number += 1
    rename(folder, aside)
    return aside


def prune(root: Path, newest: int, keep_last: int, retain_interval: int | None = None) -> None:
    """Delete all but the `keep_last` newest checkpoints up to the verified step `newest`.

    Those of steps divisible by `retain_interval` stay too, and so does what is not, by its
    manifest, this run's checkpoint of the step that its folder is called by: it may be the only
    copy of something else.
    """
    if not keep_last:
        return
    own = [entry.step for entry in entries(root) if entry.is_own and entry.step <= newest]
    for step in own[keep_last:]:
        if retain_interval and step % retain_interval == 0:
            continue
        folder = step_folder(root, step)
        # Renamed first: a deletion that is cut off leaves no folder that looks published.
        doomed = folder.with_name(f"{folder.name}.tmp-0")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def make_private(folder: str | os.PathLike) -> Path:
    """Create a folder of the run for its owner alone (mode 0700), and try to write into it.

    A folder that exists keeps its mode.

    Raises:
        StorageError: cannot be written; said before training starts.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror}") from None
    return folder
