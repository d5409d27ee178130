"""The meeting of all ranks: each once, nobody waits without a word or past a reason to stop."""

from __future__ import annotations

import datetime
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megasparse.distributed import rendezvous
from megasparse.errors import ConfigError, PeerError
from tests.dist import free_port

HOST = "127.0.0.1"


@pytest.fixture
def meet():
    """Meet at a port as some rank, in a thread; gives a future of the store."""
    with ThreadPoolExecutor(8) as threads:

        def start(port, rank, world, seconds=20.0, waiting=lambda: None, everywhere=False):
            timeout = datetime.timedelta(seconds=seconds)
            meeting = rendezvous._Meeting(HOST, port, rank, world, timeout, waiting)

            def work():
                store = meeting.store(everywhere)
                meeting.wait_for_all(store)
                return store

            return threads.submit(work)

        yield start


def test_all_meet_and_a_second_of_any_rank_is_refused(meet):
    port = free_port()
    ranks = [meet(port, rank, 3) for rank in (2, 1, 0)]
    stores = [rank.result() for rank in ranks]
    for rank in (1, 2):
        with pytest.raises(ConfigError, match=f"rank {rank} is at {HOST}:{port} already"):
            meet(port, rank, 3).result()
    with pytest.raises(ConfigError, match=f"{HOST}:{port} on .*: Address already in use"):
        meet(port, 0, 3).result()
    stores[0].set("key", "value")  # the others go on undisturbed
    assert stores[2].get("key") == b"value"


def test_ranks_of_one_torchrun_outlive_its_store(meet, monkeypatch):
    """Rank 0 keeps theirs; a second rank 0 is refused. With more hosts too, if they can reach it.

    The agent's store listens on every interface, and ends with the agent.
    """
    timeout = datetime.timedelta(seconds=20)
    agent = dist.TCPStore(HOST, 0, None, True, timeout=timeout, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    stores = [rank.result() for rank in [meet(agent.port, rank, 3) for rank in (2, 0, 1)]]
    (port,) = {store.port for store in stores}
    assert port != agent.port
    with pytest.raises(ConfigError, match=f"rank 0 is at {HOST}:{port} already"):
        meet(agent.port, 0, 3).result()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # three hosts
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the agent and its store stay
    distant = [rank.result() for rank in [meet(agent.port, rank, 3) for rank in (2, 1, 0)]]
    assert agent.port not in {store.port for store in distant}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    # As where a host's own name means loopback on it, and the host on others.
    monkeypatch.setattr(rendezvous, "local_address", lambda _: "127.0.1.1")
    others = [rank.result() for rank in [meet(agent.port, rank, 3) for rank in (2, 1, 0)]]
    assert {store.port for store in others} == {agent.port}
    del agent, others
    for left in (stores, distant):
        left[1].set("key", "value")
        assert left[0].get("key") == left[2].get("key") == b"value"


def test_ranks_that_count_differently_are_refused(meet):
    port = free_port()
    first, second = meet(port, 0, 2), meet(port, 1, 3, seconds=3.0)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2 on rank 0, and another number"):
        first.result()
    with pytest.raises((PeerError, ConfigError)):
        second.result()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_says_for_whom_and_gives_up(meet, monkeypatch, caplog, rank):
    monkeypatch.setattr(rendezvous, "TOLD_AFTER_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "logger", (lines := _Lines()).logger)
    with pytest.raises(PeerError, match=f"rank {rank} of 2 on .* has waited 1 s for rank"):
        meet(free_port(), rank, 2, seconds=1.0).result()
    assert sum(line.startswith(f"rank {rank} of 2 waits for rank") for line in lines.said) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_reason_to_stop_ends_the_wait(meet, rank):
    begin = time.monotonic()

    def waiting():
        if time.monotonic() - begin > 0.2:
            raise RuntimeError("told to stop")

    with pytest.raises(RuntimeError, match="told to stop"):
        meet(free_port(), rank, 2, seconds=120.0, waiting=waiting).result()


def test_every_interface_only_by_the_flag(meet, monkeypatch):
    monkeypatch.setenv(rendezvous.LISTEN, "0.0.0.0")
    with pytest.raises(ConfigError, match="stands for every interface.*--listen-on-all-interfaces"):
        meet(free_port(), 0, 2).result()
    monkeypatch.setattr(rendezvous, "logger", (lines := _Lines()).logger)
    port = free_port()
    ranks = [meet(port, rank, 2, everywhere=True) for rank in (0, 1)]
    assert ranks[0].result() and ranks[1].result()
    assert any("listens on every interface" in line for line in lines.said)


def test_a_port_of_some_other_program_is_no_store(meet):
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PeerError, match="has waited 2 s for an answer of rank 0's store"):
            meet(port, 1, 2, seconds=2.0).result()


class _Lines:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.logger = SimpleNamespace(info=self._say, warning=self._say)

    def _say(self, line: str, *values: object) -> None:
        self.said.append(line % values)
