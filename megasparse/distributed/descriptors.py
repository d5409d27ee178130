"""Open files: what a rank of a run needs, and what its process may have.

A socket is an open file. Rank 0 keeps one for every rank at its store, and one for every host's
leader that watches it; any other connection is along a tree or a ring, so it grows with the
logarithm of the ranks. The usual soft limit of 1,024 is too low from about a thousand ranks on.
"""

from __future__ import annotations

import errno
import resource

from megasparse.errors import ConfigError

# Libraries, log files, data files and their workers, GPU drivers, NCCL's own sockets.
BASE = 256


def needed(rank: int, world: int) -> int:
    """Open files that a rank of a run may need at a time.

    Twice the ranks on rank 0: each may watch its store by itself, where hosts have one rank.
    """
    return BASE + 8 * world.bit_length() + (2 * world if rank == 0 else 0)


def raise_limit() -> int:
    """Let this process have as many open files as the system allows it; how many these are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # some systems forbid what their hard limit promises
        return soft
    return hard


def require(rank: int, world: int) -> None:
    """Raise the limit, and refuse to start with too few.

    Raises:
        ConfigError: names the limit, the need, and what to do.
    """
    limit = raise_limit()
    if 0 <= limit < needed(rank, world):  # -1: no limit
        raise ConfigError(message(rank, world, limit))


def message(rank: int, world: int, limit: int | None = None) -> str:
    """One line on too few open files."""
    found = limit if limit is not None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"rank {rank} may have {found} open files, expected at least {needed(rank, world)} for "
        f"{world} ranks; raise the hard limit (ulimit -Hn, LimitNOFILE of the service that starts "
        "the job)"
    )


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that no more files can be opened."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return "Too many open files" in str(error)
