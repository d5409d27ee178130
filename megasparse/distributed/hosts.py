"""The ranks of one host, and the channel that they and their leader share.

Of the ranks on a host one is the leader: rank 0 on its own host, elsewhere the first to come. The
leader keeps a store for its host that listens on loopback alone, so the others talk to no other
host; only leaders talk to rank 0's store. Ranks are on one host when they share its loopback and
can see each other's processes: a container of its own is a host of its own.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

Connect = Callable[[str, int], dist.Store]


@dataclass
class HostChannel:
    """What connects a rank with its host and, if it leads it, with rank 0.

    Attributes:
        store: of the host; rank 0's own on its host.
        leader: rank that leads the host.
        up: rank 0's store, for the leaders of other hosts; None for all other ranks.
        server: what must live as long as the host's ranks need the store.
    """

    store: dist.Store
    leader: int
    up: dist.Store | None = None
    server: object = None


def host_identity() -> str:
    """The same for all processes that share loopback and process numbers, and for no others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid"))
    return "/".join([boot, *map(str, spaces)])


def join_host(main: dist.Store, rank: int, identity: str, connect: Connect) -> HostChannel:
    """Find or become the leader of this host.

    Args:
        main: rank 0's store, by this rank's own connection.
        identity: of this host.
        connect: gives a client of the store at an address.
    """
    if rank == 0:
        main.set("host-of-rank-0", identity)
        return HostChannel(main, 0)
    if main.get("host-of-rank-0").decode() == identity:
        return HostChannel(main, 0)
    leader = int(main.compare_set(f"leader-of/{identity}", "", str(rank)))
    if leader != rank:
        port = int(main.get(f"port-of/{identity}"))
        return HostChannel(connect("127.0.0.1", port), leader)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = dist.TCPStore(
        "127.0.0.1",
        port,
        None,
        True,
        datetime.timedelta(seconds=30),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    main.set(f"port-of/{identity}", str(port))
    return HostChannel(connect("127.0.0.1", port), rank, main, server)


def process_state(pid: int) -> str:
    """Of a process on this host: "gone" (dead, perhaps not yet buried), "stopped" or "alive"."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    letter = text.rpartition(")")[2].split()[0]
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "alive")


def is_starved() -> bool:
    """Whether more processes want to run on this host than it has cores for."""
    return os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
