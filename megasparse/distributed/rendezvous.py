"""Joining the group of ranks that the launcher described, with no listener that is not needed.

torch's own server for the rendezvous listens on every interface of the host. Here it is bound to
one address: MASTER_ADDR's, or MEGASPARSE_LISTEN_ADDR where rank 0's host has that address under
another number (behind a NAT, in a container). On one node MASTER_ADDR is loopback; gloo and NCCL
are kept on loopback then as well. Between nodes gloo takes the interface that leads to
MASTER_ADDR, unless GLOO_SOCKET_IFNAME names one; NCCL finds its own (NCCL_SOCKET_IFNAME).

Under `torchrun` its agent keeps a store, which listens everywhere: torch's own. The ranks only
learn there where rank 0 keeps theirs, so that they can save when the agent is gone.
"""

from __future__ import annotations

import datetime
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megasparse.distributed import descriptors
from megasparse.distributed.environment import attempt, is_unspecified, settle_environment
from megasparse.distributed.interfaces import interface_towards, is_loopback, local_address
from megasparse.errors import ConfigError, PeerError
from megasparse.log import logger

LISTEN = "MEGASPARSE_LISTEN_ADDR"
LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.5
TOLD_AFTER_SECONDS = 10.0  # of waiting
# How many nodes the launcher started: DeepSpeed's, torchrun's.
_NODES = ("CROSS_SIZE", "GROUP_WORLD_SIZE")


def own_device() -> torch.device:
    """Where this rank computes; a GPU becomes the process's current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def leave_group() -> None:
    """Leave the process group after a run that ended well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def join_group(
    device: torch.device,
    timeout: datetime.timedelta,
    watch: Callable[[tuple[str, int] | None], object] = lambda _: None,
    waiting: Callable[[], object] = lambda: None,
    listen_everywhere: bool = False,
) -> None:
    """Bring torch.distributed up, if it is not.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from `deepspeed` or `torchrun`,
    or from what `srun` and `mpirun` say; without them the process is a run of one rank, which
    listens nowhere.

    Args:
        watch: called once all ranks are there, with host and port of the store; None if the group
            was there already or has one rank. Backends wait long for a rank that dies while they
            connect.
        waiting: called again and again while this rank waits for others; ends that by raising.
        listen_everywhere: rank 0's store listens on every interface of its host.

    Raises:
        ConfigError: the environment says nothing that can be right.
        PeerError: not all ranks came within the timeout.
    """
    if dist.is_initialized():
        watch(None)
        return
    rank, world = settle_environment()
    host = os.environ["MASTER_ADDR"]
    # One rank alone meets nobody: whatever the variable says is not used.
    port = int(os.environ["MASTER_PORT"]) if world > 1 else 0
    _choose_interface(host, world)
    descriptors.require(rank, world)
    # gloo connects two ranks when they first talk, not all with all (read before the first group).
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    store: dist.Store
    try:
        if world == 1:
            store = dist.HashStore()
            watch(None)
        else:
            meeting = _Meeting(host, port, rank, world, timeout, waiting)
            server = meeting.store(listen_everywhere)
            meeting.wait_for_all(server)
            store = server
            watch((meeting.host, server.port))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt-{attempt()}", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        # Every rank is there: an error at this point is one line on each of them.
        dist.barrier()
    except (dist.DistError, RuntimeError) as error:
        if descriptors.is_exhausted(error):
            raise ConfigError(descriptors.message(rank, world)) from None
        reason = " ".join(str(error).split())
        raise PeerError(
            f"the {world} ranks did not meet at {host}:{port} (this one is on "
            f"{socket.gethostname()}): {reason}"
        ) from None


def _choose_interface(host: str, world: int) -> None:
    """Say on which interface gloo and, on one node, NCCL talk; the user's choice stands."""
    if world == 1 or is_loopback(host):
        said = (os.environ.get(name, "1") for name in _NODES)
        nodes = max((int(n) for n in said if n.isascii() and n.isdigit() and len(n) < 8), default=1)
        if nodes > 1 and world > 1:
            logger.warning(
                "MASTER_ADDR %s is loopback on %s, but %d nodes were started: other hosts cannot "
                "reach it; give the launcher an address that they can (--master_addr)",
                host,
                socket.gethostname(),
                nodes,
            )
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        return
    interface = interface_towards(host)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


class _Meeting:
    """The place where all ranks of a run meet, before they wait for each other in any library."""

    def __init__(
        self,
        host: str,
        port: int,
        rank: int,
        world: int,
        timeout: datetime.timedelta,
        waiting: Callable[[], object],
    ) -> None:
        self._host, self._port, self._rank, self._world = host, port, rank, world
        self._timeout, self._waiting = timeout, waiting
        self._keys = f"meeting-{attempt()}"
        self._begin, self._told = time.monotonic(), False

    def store(self, listen_everywhere: bool) -> dist.TCPStore:
        """Rank 0: the store, on an address of its own. The others: once it answers, a client."""
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if not self._rank and not of_agent:
            return self._tcp_store(self._listen(listen_everywhere))
        while not self._answers():
            self._go_on_waiting(lambda: f"rank 0 at {self._host}:{self._port}")
        found = self._client()
        return self._beside(found) if of_agent else found

    def _beside(self, agents: dist.TCPStore) -> dist.TCPStore:
        """A store of rank 0's own; the agent's says where it is.

        Where other hosts may not reach an address of rank 0's, the agent's store itself.
        """
        key = f"{self._keys}/place"
        if self._rank == 0 and agents.add(f"{self._keys}/keepers", 1) == 1:
            address = self._own_address()
            if address is None:
                agents.set(key, "")
                return agents
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, 0), family=family)
            self._host, self._port = listener.getsockname()[:2]
            own = self._tcp_store(listener)
            agents.set(key, f"{self._host} {self._port}")
            return own
        while not agents.check([key]):
            self._go_on_waiting(lambda: f"rank 0, which has not said its port at {self._host}")
        place = agents.get(key).decode().split()
        if not place:
            return agents
        self._host, self._port = place[0], int(place[1])
        return self._client()

    def _own_address(self) -> str | None:
        """Where rank 0's store listens for ranks of a torchrun; None: they keep to the agent's.

        On several hosts it is the address towards MASTER_ADDR, over which gloo's connections go
        as well. Not where that name means loopback here and another host elsewhere, nor behind a
        NAT, where the user says an address for one port.
        """
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self._world):
            return LOOPBACK
        address = None if LISTEN in os.environ else local_address(self._host)
        if address is None or (is_loopback(address) and address != self._host):
            return None
        return address

    @property
    def host(self) -> str:
        """Where the store is."""
        return self._host

    def wait_for_all(self, store: dist.TCPStore) -> None:
        """Wait until every rank has come, and each once.

        Raises:
            ConfigError: another process is this rank already, or ranks count differently.
        """
        keys, here = self._keys, f"{self._host}:{self._port}"
        if store.add(f"{keys}/rank-{self._rank}", 1) > 1:
            raise ConfigError(
                f"rank {self._rank} is at {here} already: MASTER_PORT is that of another run, or "
                f"two processes have RANK={self._rank}"
            )
        worlds = store.add(f"{keys}/worlds", self._world)
        come = store.add(f"{keys}/come", 1)
        while come < self._world:
            self._go_on_waiting(lambda: f"{self._missing(store)} at {here}")
            come = store.add(f"{keys}/come", 0)
        worlds = store.add(f"{keys}/worlds", 0)
        if come != self._world or worlds != self._world * self._world:
            raise ConfigError(
                f"WORLD_SIZE is {self._world} on rank {self._rank}, and another number on other "
                f"ranks that came to {here}"
            )

    def _missing(self, store: dist.TCPStore) -> str:
        ranks = (r for r in range(self._world) if not store.add(f"{self._keys}/rank-{r}", 0))
        first = [str(rank) for rank in itertools.islice(ranks, 9)]
        return f"ranks {', '.join(first[:8])}{' and others' if len(first) > 8 else ''}"

    def _go_on_waiting(self, of: Callable[[], str]) -> None:
        """Wait a moment; say so after some time, and give up after the timeout."""
        self._waiting()
        waited = time.monotonic() - self._begin
        if waited >= self._timeout.total_seconds():
            raise PeerError(
                f"rank {self._rank} of {self._world} on {socket.gethostname()} has waited "
                f"{waited:.0f} s for {of()} (--distributed-timeout-minutes)"
            )
        if waited >= TOLD_AFTER_SECONDS and not self._told:
            self._told = True
            logger.warning(
                "rank %d of %d waits for %s, for at most %.0f s; if none is to come, check RANK, "
                "WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
                self._rank,
                self._world,
                of(),
                self._timeout.total_seconds(),
            )
        time.sleep(POLL_SECONDS if waited > 1.0 else POLL_SECONDS / 10)

    def _client(self) -> dist.TCPStore:
        """A client of the store that answers there.

        In a thread: torch waits for ever for an answer of a program that is no store.
        """
        found: list[dist.TCPStore | Exception] = []

        def connect() -> None:
            try:
                found.append(self._tcp_store(None))
            except (dist.DistError, RuntimeError) as error:
                found.append(error)

        threading.Thread(target=connect, name="store", daemon=True).start()
        while not found:
            self._go_on_waiting(lambda: f"an answer of rank 0's store at {self._host}:{self._port}")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _answers(self) -> bool:
        try:
            socket.create_connection((self._host, self._port), timeout=2.0).close()
        except OSError:
            return False
        return True

    def _listen(self, everywhere: bool) -> socket.socket:
        name = LISTEN if LISTEN in os.environ else "MASTER_ADDR"
        listen = os.environ.get(LISTEN) or self._host
        if is_unspecified(listen) and not everywhere:
            raise ConfigError(
                f"{name}: {listen} stands for every interface of {socket.gethostname()}; give the "
                "address of one, or --listen-on-all-interfaces"
            )
        try:
            info = socket.getaddrinfo(listen, self._port, type=socket.SOCK_STREAM)[0]
            if everywhere:
                listen = "::" if info[0] == socket.AF_INET6 else "0.0.0.0"
            listener = socket.create_server((listen, self._port), family=info[0])
        except OSError as error:
            raise ConfigError(
                f"{name}:MASTER_PORT {listen}:{self._port} on {socket.gethostname()}: "
                f"{error.strerror}"
            ) from None
        logger.info(
            "%d ranks meet at %s; the store listens on %s",
            self._world,
            self._host,
            listener.getsockname()[:2],
        )
        if everywhere:
            logger.warning(
                "the store listens on every interface of %s: whoever reaches port %d can read and "
                "disturb this run",
                socket.gethostname(),
                self._port,
            )
        return listener

    def _tcp_store(self, listener: socket.socket | None) -> dist.TCPStore:
        more = {} if listener is None else {"master_listen_fd": listener.detach()}
        return dist.TCPStore(
            self._host,
            self._port,
            self._world,
            listener is not None,
            timeout=self._timeout,
            wait_for_workers=False,
            **more,  # type: ignore[arg-type]
        )
