"""A line between the processes of one host that do the same work, through one of them that leads.

The leader has a Unix socket by name and passes on what each process says to all others. A process
that finds no leader becomes it, so there is another one soon after a leader has ended. The socket
is in no file system and ends with its process: nothing is left behind, and nobody polls a file.
Only the leader looks at files that hosts share, and tells the others what it has found.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

Message = dict[str, Any]
MAX_LINE = 1 << 16
SEND_SECONDS = 1.0
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class HostLine:
    """One process's end of the line; messages are JSON objects, and may come twice.

    Args:
        name: of the work; the same for the processes that belong together, and for no others.

    Attributes:
        leads: whether this process is the one of its host that looks at what hosts share.
    """

    def __init__(self, name: str) -> None:
        # The zero byte puts the name beside the file system, into the network namespace.
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        self._address = f"\0megasparse-{os.getuid()}-{digest}"
        self._server: socket.socket | None = None
        self._peers: dict[socket.socket, bytes] = {}  # received, up to the next end of a line
        self._own: list[Message] = []
        self._all: list[Message] = []  # heard or said: a process that comes later is told
        self.leads = False
        self._join()

    def say(self, message: Message) -> None:
        """Tell all other processes, those that come later too."""
        self._own.append(message)
        self._keep(message)
        self._send(message, list(self._peers))

    def hear(self, seconds: float) -> list[Message]:
        """What the others have said.

        Args:
            seconds: to wait for it, at most.
        """
        if not self.leads and not self._peers:
            self._join()
        ends = [*self._peers, *([self._server] if self._server is not None else [])]
        heard: list[Message] = []
        for end in wait(ends, seconds):
            if end is self._server:
                self._accept()
                continue
            if end not in self._peers:  # lost while another one was heard
                continue
            for message in self._receive(end):
                self._keep(message)
                heard.append(message)
                if self.leads:
                    self._send(message, [peer for peer in self._peers if peer is not end])
        return heard

    def close(self) -> None:
        """Leave the line; what was said before still reaches the others."""
        for end in [*self._peers, *([self._server] if self._server is not None else [])]:
            end.close()
        self._peers.clear()
        self._server, self.leads = None, False

    def _join(self) -> None:
        """Connect to the leader, or become it; if neither succeeds the next `hear` tries again."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end.settimeout(SEND_SECONDS)
        try:
            end.connect(self._address)
        except OSError:
            end.close()
            self._lead()
            return
        if not _is_own(end):  # a stranger has taken the name: each process is on its own
            end.close()
            self.leads = True
            return
        self._peers[end] = b""
        for message in self._own:
            self._send(message, [end])

    def _lead(self) -> None:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            server.bind(self._address)
            server.listen(socket.SOMAXCONN)
        except OSError:  # another process was quicker
            server.close()
            return
        self._server, self.leads = server, True

    def _accept(self) -> None:
        assert self._server is not None
        try:
            end, _ = self._server.accept()
        except OSError:
            return
        if not _is_own(end):
            end.close()
            return
        end.settimeout(SEND_SECONDS)
        self._peers[end] = b""
        for message in self._all:
            self._send(message, [end])

    def _keep(self, message: Message) -> None:
        if message not in self._all:
            self._all.append(message)

    def _receive(self, end: socket.socket) -> list[Message]:
        try:
            content = end.recv(MAX_LINE)
        except OSError:
            content = b""
        *lines, rest = (self._peers[end] + content).split(b"\n")
        self._peers[end] = rest
        if not content or len(rest) > MAX_LINE:
            self._drop(end)
        messages = []
        for line in lines:
            with suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    messages.append(message)
        return messages

    def _send(self, message: Message, ends: list[socket.socket]) -> None:
        content = json.dumps(message).encode() + b"\n"
        for end in ends:
            try:
                end.sendall(content)
            except OSError:
                self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        self._peers.pop(end, None)
        end.close()


def _is_own(end: socket.socket) -> bool:
    """Whether the process at the other end is this user's."""
    size = _CREDENTIALS.size
    try:
        found = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    except OSError:
        return False
    return bool(_CREDENTIALS.unpack(found)[1] == os.getuid())
