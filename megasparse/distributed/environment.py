"""Which rank this process is, from the variables that a launcher set; nothing is waited for here.

`deepspeed`, `torchrun` and `launch/slurm` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. `srun` and `mpirun` have variables of their own, which are taken where they say enough.
Without any the process is a run of one rank. What cannot be right is refused before anything waits.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import Any

from megasparse.errors import ConfigError

LAUNCH, ATTEMPT = "MEGASPARSE_LAUNCH", "MEGASPARSE_ATTEMPT"
DEFAULT_PORT = 29500
MAX_RANKS = 1 << 20
_ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@dataclass(frozen=True)
class Starter:
    """The variables of a program that starts processes: size, rank, rank on the host, and so on.

    Attributes:
        local_size: processes on this host, if it says so.
    """

    name: str
    size: str
    rank: str
    local_rank: str
    local_size: str | None


STARTERS = (
    Starter(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Starter(
        "mpirun (MVAPICH)",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Starter(
        "srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
    ),
    Starter(
        "mpirun (MPICH, Intel MPI)", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
    ),
)


def settle_environment() -> tuple[int, int]:
    """Fill in what the launcher left out, and check all of it.

    Returns:
        Rank and number of ranks.

    Raises:
        ConfigError: a variable that is no such value, or several that contradict each other.
    """
    _adopt()
    alone = os.environ.get("WORLD_SIZE", "1").strip() == "1"
    if not alone:
        missing = [
            name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
        ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but {', '.join(missing)} is not set; "
                "start all ranks by deepspeed, torchrun or launch/slurm, or unset WORLD_SIZE"
            )
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    world = _number("WORLD_SIZE", 1, MAX_RANKS)
    rank = _number("RANK", 0, world - 1)
    _number("LOCAL_RANK", 0, MAX_RANKS)
    if world > 1:
        _number("MASTER_PORT", 1, 65535)
        _check_address(os.environ["MASTER_ADDR"])
    return rank, world


def attempt() -> str:
    """Which start of the same job this is; keeps what restarts leave apart."""
    return "-".join(os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", ATTEMPT))


def rank_for_log() -> int:
    """This process's rank as far as it is known, for lines about an environment that is wrong."""
    for name in ("RANK", *(starter.rank for starter in STARTERS)):
        value = os.environ.get(name, "")
        if value.isascii() and value.isdigit() and len(value) < 8:
            return int(value)
    return 0


def is_unspecified(host: str) -> bool:
    """Whether a name or address stands for every interface of a host."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_unspecified
    except ValueError:
        return host == ""


def launch_identity() -> dict[str, Any]:
    """What all ranks of one start have in common, for the owner's note in a lock.

    `meeting` holds on all hosts; `launch` is the process that started the ranks of this host.
    """
    host, port = (os.environ.get(name, _ALONE[name]) for name in ("MASTER_ADDR", "MASTER_PORT"))
    return {"meeting": f"{host}:{port}", "launch": launch_number()}


def launch_number() -> int:
    """The process that started this host's ranks: their parent, or their supervisors' parent."""
    value = os.environ.get(LAUNCH, "")
    return int(value) if value.isdecimal() else os.getppid()


def is_same_launch(record: dict[str, Any]) -> bool:
    """Whether the owner of a lock is of the same start as this process."""
    mine = launch_identity()
    if record.get("meeting") != mine["meeting"]:
        return False
    return record.get("host") != socket.gethostname() or record.get("launch") == mine["launch"]


def _adopt() -> None:
    """Take rank and size from `srun` or `mpirun`, if the process was started by them alone.

    Raises:
        ConfigError: it was, and they do not say enough.
    """
    for starter in STARTERS:
        if os.environ.get(starter.size, "1") == "1" or starter.rank not in os.environ:
            continue
        size, rank = os.environ[starter.size], os.environ[starter.rank]
        given = (os.environ.get("RANK"), os.environ.get("WORLD_SIZE"))
        if given != (None, None):
            if starter.name == "srun" or given == (rank, size):
                return  # srun started a launcher, which set them (launch/slurm/node.sh)
            raise ConfigError(
                f"RANK is {given[0]!r} and WORLD_SIZE {given[1]!r}, but {starter.name} says rank "
                f"{rank} of {size}; unset RANK and WORLD_SIZE, or start the ranks by them alone"
            )
        if "MASTER_ADDR" not in os.environ and not _on_one_host(starter, size):
            raise ConfigError(
                f"{starter.name} started {size} processes on several hosts; set MASTER_ADDR to an "
                "address of rank 0's host, or start by launch/slurm, deepspeed or torchrun"
            )
        os.environ.update(RANK=rank, WORLD_SIZE=size)
        os.environ["LOCAL_RANK"] = os.environ.get(starter.local_rank, rank)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_port()))
        return
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"SLURM_NTASKS is {tasks}, but this process was not started by srun, deepspeed or "
            "torchrun; use launch/slurm/pretrain.sbatch, or srun, or set RANK=0 WORLD_SIZE=1 for "
            "one rank"
        )


def _on_one_host(starter: Starter, size: str) -> bool:
    """Whether all processes are on this host, as far as their starter says."""
    if starter.name == "srun":
        return os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES")) == "1"
    return starter.local_size is not None and os.environ.get(starter.local_size) == size


def _port() -> int:
    """A port that all ranks of a job choose alike, and jobs on one host differently."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return 12000 + int(job) % 20000 if job.isdecimal() else DEFAULT_PORT


def _number(name: str, least: int, most: int) -> int:
    text = os.environ[name].strip()
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    if value is None or not least <= value <= most:
        raise ConfigError(
            f"{name}: found {os.environ[name][:40]!r}, expected a whole number from {least} to "
            f"{most}" + (f" (WORLD_SIZE is {most + 1})" if name == "RANK" else "")
        )
    return value


def _check_address(host: str) -> None:
    if is_unspecified(host):
        raise ConfigError(
            f"MASTER_ADDR: found {host!r}, expected an address at which the other ranks reach rank "
            "0 (to let its store listen on every interface: --listen-on-all-interfaces)"
        )
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"MASTER_ADDR: {host[:80]!r} is no known host: {error}") from None
