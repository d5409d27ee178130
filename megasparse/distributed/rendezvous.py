"""Joining the group of ranks that the launcher described, with no listener that is not needed.

torch's own server for the rendezvous listens on every interface of the host. Here it is bound to
one address: MASTER_ADDR's, or MEGASPARSE_LISTEN_ADDR where rank 0's host has that address under
another number (behind a NAT, in a container). On one node MASTER_ADDR is loopback; gloo and NCCL
are kept on loopback then as well. Between nodes gloo takes the interface that leads to
MASTER_ADDR, unless GLOO_SOCKET_IFNAME names one; NCCL finds its own (NCCL_SOCKET_IFNAME).

(Under `torchrun` its agent keeps the store, which listens everywhere: torch's own.)
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

from megasparse.distributed import descriptors
from megasparse.distributed.interfaces import interface_towards, is_loopback
from megasparse.errors import ConfigError, PeerError
from megasparse.log import logger

LISTEN = "MEGASPARSE_LISTEN_ADDR"
_DEFAULTS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
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
    _choose_interface(host, world)
    descriptors.require(rank, world)
    # gloo connects two ranks when they first talk, not all with all (read before the first group).
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
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
        if descriptors.is_exhausted(error):
            raise ConfigError(descriptors.message(rank, world)) from None
        reason = " ".join(str(error).split())
        raise PeerError(
            f"the {world} ranks did not meet at {host}:{port} (this one is on "
            f"{socket.gethostname()}): {reason}"
        ) from None


def attempt() -> str:
    """Which start of the same job this is; keeps the keys of restarts apart."""
    return "-".join(
        os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "MEGASPARSE_ATTEMPT")
    )


def _choose_interface(host: str, world: int) -> None:
    """Say on which interface gloo and, on one node, NCCL talk; the user's choice stands."""
    if is_loopback(host):
        nodes = max(int(os.environ.get(name, "1")) for name in _NODES)
        if nodes > 1:
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
    if interface is not None and world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


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
    listen = os.environ.get(LISTEN) or host
    try:
        family = socket.getaddrinfo(listen, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((listen, port), family=family)
    except OSError as error:
        name = LISTEN if LISTEN in os.environ else "MASTER_ADDR"
        raise ConfigError(
            f"{name}:MASTER_PORT {listen}:{port} on {socket.gethostname()}: {error.strerror}"
        ) from None
    port = listener.getsockname()[1]
    if world > 1:
        logger.info(
            "%d ranks meet at %s; the store listens on %s", world, host, listener.getsockname()[:2]
        )
    return dist.TCPStore(
        host,
        port,
        world,
        True,
        master_listen_fd=listener.detach(),
        **options,  # type: ignore[arg-type]
    )
