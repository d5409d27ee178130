"""Why a rank cannot come to the meeting of all ranks, told to those that wait for it there.

Before the ranks have met there is no channel between them but files: on one host in a folder of
this user's own for temporary files, else in the run's folder. One rank of each host looks for them
there, and tells the others that wait on its host. A note is a hint about one start: it counts for
ranks that were told to meet at the same place, in the same attempt.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_json
from megasparse.distributed.environment import is_same_launch, launch_identity
from megasparse.distributed.host_line import HostLine
from megasparse.distributed.interfaces import is_loopback
from megasparse.input_files import read_regular

Note = dict[str, Any]


class StartNotes:
    """Notes of the ranks of one start; the environment is settled.

    Args:
        run_dir: of the run.
        rank: of this process.
        attempt: which start of the job this is.
    """

    def __init__(self, run_dir: Path, rank: int, attempt: str) -> None:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        self._world = int(os.environ["WORLD_SIZE"])
        self._folder = _own_folder() if is_loopback(host) else run_dir
        self._name = f".start-{re.sub('[^A-Za-z0-9.]', '_', f'{host}-{port}')}-{attempt}"
        self._rank = rank
        launch = launch_identity()["launch"]
        self._line_name = f"{run_dir.absolute()}/{self._name} {launch}"
        self._line: HostLine | None = None

    def clear(self) -> None:
        """This rank has begun: what it left in an earlier start of the same name is over."""
        if self._folder is not None and self._world > 1:
            with suppress(OSError):
                self._path(self._rank).unlink()

    def leave(self, message: str, exit_code: int) -> None:
        """This rank ends before the meeting, and why."""
        if self._folder is None or self._world == 1 or not self._folder.is_dir():
            return
        note = {"rank": self._rank, "message": message, "code": exit_code}
        note |= {**launch_identity(), "host": socket.gethostname()}
        if self._line is not None:
            self._line.say(note)
        with suppress(OSError):
            write_json(self._path(self._rank), note)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one of its host that looks at what hosts share."""
        if self._line is None and self._world > 1:
            self._line = HostLine(self._line_name)
        return self._line is None or self._line.leads

    def find(self) -> Note | None:
        """The note of another rank of this start, if there is one and this host knows of it."""
        leads = self.leads
        for told in self._line.hear(0.0) if self._line is not None else ():
            if told.get("rank") != self._rank and _is_note(told):
                return told
        note = self._search() if leads else None
        if note is not None and self._line is not None:
            self._line.say(note)
        return note

    def close(self) -> None:
        """The ranks have met: notes are read no more."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _search(self) -> Note | None:
        if self._folder is None:
            return None
        for path in sorted(self._folder.glob(f"{self._name}-*.json")):
            try:
                note = json.loads(read_regular(path, 1 << 20))
                if note["rank"] != self._rank and is_same_launch(note) and _is_note(note):
                    return note
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
        return None

    def _path(self, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}-{rank}.json"


def _is_note(note: Note) -> bool:
    return isinstance(note.get("message"), str) and isinstance(note.get("code"), int)


def _own_folder() -> Path | None:
    """A folder of this user's own among the temporary files; None: somebody else has its name."""
    folder = Path(tempfile.gettempdir()) / f"megasparse-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return folder if own and not status.st_mode & 0o022 else None
