"""Runs on a small file system that fills up: `python -m tests.checkpoint.disk_full DATA DIR LOGS`.

The first run has room for its first checkpoints only and must stop with the words and exit code of
a full disk, leaving the checkpoint before intact and nothing half-written. The second is allowed to
go on without saving. The third continues once there is room, and ends as if nothing had been.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megasparse.checkpoint import directory
from megasparse.checkpoint.saver import choose
from megasparse.distributed.control_plane import ControlPlane
from tests import forked
from tests.reliability.runs import differences, flags


def main(data: str, small: Path, logs: Path) -> None:
    root = small / "checkpoints"
    run = flags(data, logs / "run", "--save", str(root), "--keep-last", "0", "--save-interval", "2")
    assert forked.run(flags(data, logs / "reference"), 1, logs / "reference.log") == [0]
    codes = forked.run(run, 1, logs / "full.log")
    text = (logs / "full.log.0").read_text()
    assert codes == [74], (codes, text)
    assert "no room for a checkpoint" in text and "Traceback" not in text, text
    steps = directory.list_steps(root)
    assert steps and choose(root, ControlPlane(None)).meta["step"] == steps[0] < 20
    assert not list(root.glob("*.tmp-*")), "half-written files are left"
    told = len(steps)

    # A full disk that is noticed only while writing: the free space is taken after the check.
    environment = {"MEGASPARSE_FAULT": "enospc@0:*:save:sync"}
    allowed = [*run, "--resume", "--max-failed-saves", "99"]
    codes = forked.run(allowed, 1, logs / "on.log", environment)
    text = (logs / "on.log.0").read_text()
    assert codes == [74], (codes, text)  # it went on to the end, where a checkpoint is a must
    assert "training goes on" in text and "step 20/20" in text, text
    assert directory.list_steps(root) == steps

    for step in steps[1:]:
        folder = directory.step_folder(root, step)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    codes = forked.run([*run, "--resume", "--keep-last", "2"], 1, logs / "room.log")
    assert codes == [0], (logs / "room.log.0").read_text()
    (logs / "run" / "checkpoints").symlink_to(root)
    found = differences(logs / "run", logs / "reference")
    assert not found, found
    print(f"{told} checkpoints fitted, exit code 74, the newest intact, continued bit for bit")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
