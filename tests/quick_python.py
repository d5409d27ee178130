"""A `python` that starts in milliseconds: commands that users type, without seconds of imports.

It hands a script or a module to a server that has imported everything, which forks; arguments,
folder, environment, streams and exit code are those of the command. The fork starts with nothing of
the tests, but finds modules imported: what a command imports by itself, and how launchers start
real processes, is tested by `tests/launch` and by the commands that others start with the real one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import stat
import sys
import threading
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.forkserver import context

# Its own interpreter starts without site-packages. The streams travel with the request.
CLIENT = """#!{interpreter} -IS
import json, os, socket, sys
if sys.argv[1].startswith("-") and sys.argv[1] not in ("-m", "-u", "-B"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    environment = dict(os.environ)
    if "RANK" in environment:  # ranks of one launcher have different parents as forks
        environment.setdefault("MEGASPARSE_LAUNCH", str(os.getppid()))
    request = json.dumps([sys.argv, os.getcwd(), environment]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "little")], [0, 1, 2])
    server.sendall(request)
    code = server.recv(4)
sys.exit(int.from_bytes(code, "little") if code else 1)
"""


def start(folder: Path) -> tuple[Path, BaseProcess]:
    """Start a server; the path of its `python`, and its process, which the caller kills."""
    client, address = folder / "python", str(folder / "server")
    interpreter = os.path.realpath(sys.executable)
    client.write_text(
        CLIENT.format(interpreter=interpreter, python=sys.executable, address=address)
    )
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    ours, theirs = context().Pipe()
    server = context().Process(target=_serve, args=(address, str(client), theirs))
    server.start()
    assert ours.poll(60) and ours.recv() == "ready"
    return client, server


def _serve(address: str, client: str, ready) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    ready.send("ready")
    while True:
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            _keep(connection, client)
        connection.close()


def _keep(connection: socket.socket, client: str) -> None:
    """Run what one client asks for in a child, and tell the client how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    size, request = int.from_bytes(head, "little"), b""
    while len(request) < size:
        request += connection.recv(size - len(request))
    child = os.fork()
    if child == 0:
        connection.close()
        _be(json.loads(request), streams, client)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    # A client that was ended by a signal hands that on to its command.
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):  # the client is gone
        connection.sendall((code if code >= 0 else 128 - code).to_bytes(4, "little"))
    os._exit(0)


def _be(request: list, streams: list[int], client: str) -> None:
    """Be the command; never returns."""
    arguments, folder, environment = request
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = client
    arguments = arguments[1:]
    while arguments[0] in ("-u", "-B"):
        arguments.pop(0)
    # What Python does with PYTHONPATH, and with the folder of a script or of `-m`.
    first = folder if arguments[0] == "-m" else str(Path(arguments[0]).resolve().parent)
    sys.path[0:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0) & 255)
