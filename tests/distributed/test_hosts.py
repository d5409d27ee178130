"""Ranks of several hosts watch each other through the leaders of their hosts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megasparse.distributed import leaders
from megasparse.distributed.hosts import host_identity, process_state
from megasparse.distributed.leaders import PATIENCE, Silence
from megasparse.distributed.watchdog import EXPLAIN_SECONDS
from tests import forked
from tests.dist import free_port
from tests.forkserver import context

WORLD, A_HOST = 6, 2  # ranks 2 and 4 lead the second and third host


def _rank(rank: int, port: int, folder: str, fault: str, seconds: float) -> None:
    """One rank that trains, so to say, until the fault strikes it or the watchdog ends it."""
    import torch.distributed as dist

    from megasparse import log
    from megasparse.distributed.watchdog import Watchdog

    out = os.open(f"{folder}/log.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 2)
    log.setup(rank)
    options = {"timeout": timedelta(seconds=30), "wait_for_workers": False}
    if rank == 0:
        options["master_listen_fd"] = socket.create_server(("127.0.0.1", port)).detach()
    store = dist.TCPStore("127.0.0.1", port, WORLD, rank == 0, **options)
    watch = Watchdog(
        ("127.0.0.1", port), "0", rank, WORLD, 1.0, Path(folder), host=f"host {rank // A_HOST}"
    )
    store.add("here", 1)
    end = time.monotonic() + seconds
    struck = False
    all_here = False
    watch.passed("micro_batch", 3)
    while time.monotonic() < end:
        try:
            all_here = all_here or store.add("here", 0) == WORLD
        except RuntimeError:  # as a run does whose connections break
            verdict = watch.explain()
            assert verdict is not None
            log.logger.error("PeerError: %s", verdict.message)
            os._exit(verdict.exit_code)
        if all_here and fault.endswith(f"@{rank}") and not struck:
            struck = True
            time.sleep(0.5)
            connections = len(os.listdir("/proc/self/fd"))
            Path(folder, f"files.{rank}").write_text(str(connections))
            if fault.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.startswith("fail"):
                watch.fail("no such file", 65)
                os._exit(65)
        if not (struck and fault.startswith("hang")):
            watch.passed("micro_batch", 3)
        time.sleep(0.05)
    watch.stop()
    store.add("left", 1)
    while rank == 0 and store.add("left", 0) < WORLD:  # which keeps the store
        time.sleep(0.05)
    os._exit(0)


def _run(folder: Path, fault: str, seconds: float) -> tuple[list[int | None], list[str]]:
    port = free_port()
    ranks = [
        context().Process(target=_rank, args=(rank, port, str(folder), fault, seconds))
        for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    codes = forked.wait(ranks)
    return codes, [(folder / f"log.{rank}").read_text() for rank in range(WORLD)]


KILLS = ["kill@0", "kill@2", "kill@3"]  # rank 0, the leader of another host, one that is led
HANG, FAIL, NONE = "hang@5", "fail@4", "none@0"


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Iterator[Callable[[str], Any]]:
    """Folder, exit codes and logs by fault. The ranks wait, so three groups go side by side."""
    seconds = {**dict.fromkeys([*KILLS, HANG, FAIL], 60.0), NONE: 4.0}
    folders = {fault: tmp_path_factory.mktemp("hosts") for fault in seconds}
    with ThreadPoolExecutor(3) as pool:
        runs = {f: pool.submit(_run, folder, f, seconds[f]) for f, folder in folders.items()}
        yield lambda fault: (folders[fault], *runs[fault].result())


@pytest.mark.parametrize("fault", KILLS)
def test_a_killed_rank_is_named_on_all_hosts(ended, fault):
    rank, (_, codes, texts) = int(fault[-1]), ended(fault)
    assert codes == [-signal.SIGKILL if n == rank else 71 for n in range(WORLD)], texts
    for number, text in enumerate(texts):
        if number != rank:
            assert f"PeerError: rank {rank} was lost" in text, (number, text)


def test_a_hanging_rank_is_named_on_all_hosts(ended):
    _, codes, texts = ended(HANG)
    assert codes == [71] * WORLD, texts
    for text in texts:
        assert "PeerError: rank 5 hangs in step 4, micro-batch 0 for" in text


def test_the_words_and_the_code_of_a_rank_that_fails_reach_all_hosts(ended):
    _, codes, texts = ended(FAIL)
    assert codes == [65] * WORLD, texts
    for number, text in enumerate(texts):
        assert number == 4 or "rank 4 failed: no such file" in text


def test_all_is_well_and_rank_0_is_connected_with_leaders_alone(ended):
    folder, codes, texts = ended(NONE)
    assert codes == [0] * WORLD, texts
    # Its store has the ranks' own connections, and of the watchdogs those of two ranks on its own
    # host and of two leaders: not of six.
    base = int((folder / "files.0").read_text())
    assert base < 40


def test_processes_that_live_are_waited_for_longer_than_those_that_are_gone(monkeypatch):
    monkeypatch.setattr(leaders, "is_starved", lambda: False)
    silence = Silence(10.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    beat = {"pid": child.pid}
    assert process_state(child.pid) == "alive"
    assert silence.patience(beat, local=True, alarm=True) == 10.0 * PATIENCE
    child.send_signal(signal.SIGSTOP)
    while process_state(child.pid) != "stopped":
        time.sleep(0.01)
    assert silence.patience(beat, local=True) == 10.0
    assert silence.patience(beat, local=True, alarm=True) < 2.0
    child.kill()
    while process_state(child.pid) != "gone":  # it is, although nobody has waited for it
        time.sleep(0.01)
    assert silence.patience(beat, local=True) < 1.0
    child.wait()
    assert process_state(child.pid) == "gone"
    # Of another host there is its word alone.
    assert silence.patience({"starved": False}, local=False) == 10.0
    assert silence.patience({"starved": True}, local=False) == 10.0 * PATIENCE
    # A rank whose connections broke gets to know why, also where hosts are overloaded.
    soon = EXPLAIN_SECONDS / 2
    assert 5.0 < silence.patience({"starved": True}, local=False, alarm=True) < soon
    monkeypatch.setattr(leaders, "is_starved", lambda: True)
    assert 5.0 < silence.patience({"starved": False}, local=False, alarm=True) < soon
    monkeypatch.setattr(leaders, "is_starved", lambda: False)
    assert silence.patience({"starved": False}, local=False, alarm=True) < 5.0


def test_a_host_is_the_same_for_its_processes():
    code = "from megasparse.distributed.hosts import host_identity; print(host_identity())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.stdout.strip() == host_identity()
