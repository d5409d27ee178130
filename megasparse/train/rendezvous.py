"""Joining the group of ranks that the launcher described, with no listener that is not needed.

torch's own server for the rendezvous listens on every interface of the host. Here it is bound to
MASTER_ADDR, which on one node is loopback; gloo and NCCL are kept on loopback then as well.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

from megasparse.errors import ConfigError, PeerError

_DEFAULTS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def join_group(
    device: torch.device,
    timeout: datetime.timedelta,
    watch: Callable[[tuple[str, int] | None], None],
) -> None:
    """Bring torch.distributed up, if it is not.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from `deepspeed` or `torchrun`;
    without them the process is a run of one rank.

    Args:
        watch: called once the store is there, with its host and port; None if the group was there
            already or has one rank. Backends wait long for a rank that dies while they connect.

    Raises:
        PeerError: not all ranks came within the timeout.
    """
    if dist.is_initialized():
        watch(None)
        return
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    rank, world, port = (
        _number("RANK"),
        _number("WORLD_SIZE"),
        _number("MASTER_PORT"),
    )
    host = os.environ["MASTER_ADDR"]
    if host in _LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    try:
        store = _store(host, port, rank, world, timeout)
        watch((host, store.port) if world > 1 else None)
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
        reason = " ".join(str(error).split())
        raise PeerError(f"the {world} ranks did not meet at {host}:{port}: {reason}") from None


def attempt() -> str:
    """Which start of the same job this is; keeps the keys of restarts apart."""
    return "-".join(
        os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "MEGASPARSE_ATTEMPT")
    )


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(f"{name}: found {os.environ[name]!r}, expected a whole number") from None


def _store(
    host: str, port: int, rank: int, world: int, timeout: datetime.timedelta
) -> dist.TCPStore:
    options = {"timeout": timeout, "wait_for_workers": False}
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank or agent:
        return dist.TCPStore(host, port, world, False, **options)  # type: ignore[arg-type]
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR:MASTER_PORT {host}:{port}: {error.strerror}") from None
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        world,
        True,
        master_listen_fd=listener.detach(),
        **options,  # type: ignore[arg-type]
    )
