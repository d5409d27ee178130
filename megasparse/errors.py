"""Error classes with exit codes.

Every error that a user can cause is a `MegasparseError` whose message is one line that names the
field or file, what was found and what was expected. `launch/` prints that line on every rank and
exits with the class's `exit_code`; anything else is a bug and keeps its traceback.

The codes follow sysexits where it has a word for it: a scheduler can tell a run that wants to be
queued again (75) from one that must be looked at. 0 is only ever a run that is complete.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_PREEMPTED = 75  # stopped by a signal or a time limit, saved; start again with --resume
EXIT_NO_PROGRESS = 76  # restarted again and again without a new checkpoint
EXIT_CODES = (
    "0 complete; 64 configuration; 65 data; 66 checkpoint; 69 kernel; 70 numbers; 71 another rank "
    "was lost or hangs; 72 replicas differ; 74 a file cannot be written; 75 stopped by a signal or "
    "a limit, saved, continue with --resume; 76 restarts without progress; 77 a host is "
    "not fit for the run"
)


class MegasparseError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1
    problems: tuple[str, ...] = ()  # of several, found at once: one line each


class ConfigError(MegasparseError):
    """A flag, YAML key or combination of them is wrong (sizes, names, unknown keys)."""

    exit_code = 64


def together(problems: Sequence[str], kind: type[MegasparseError] = ConfigError) -> MegasparseError:
    """One error for all that is wrong: `problems` of it has the lines."""
    error = kind("; ".join(problems))
    error.problems = tuple(problems)
    return error


class DataError(MegasparseError):
    """A corpus, tokenizer or dataset file is missing, damaged, or does not fit the run."""

    exit_code = 65


class CheckpointError(MegasparseError):
    """A checkpoint is missing, damaged, or belongs to another run."""

    exit_code = 66


class KernelError(MegasparseError, ValueError):
    """A kernel was asked for shapes, dtypes or a backend that it cannot run."""

    exit_code = 69


class NumericsError(MegasparseError):
    """A NaN or an infinity where training cannot go on."""

    exit_code = 70


class PeerError(MegasparseError):
    """Another rank was lost, hangs, or failed."""

    exit_code = 71


class ReplicaError(MegasparseError):
    """Ranks that must hold the same parameters, masks or scales do not."""

    exit_code = 72


class StorageError(CheckpointError):
    """A file of the run cannot be written: disk full, no permission, folder gone, in use."""

    exit_code = 74


class PreflightError(MegasparseError):
    """A host is not fit for the run: other versions or data, too little memory, a bad GPU."""

    exit_code = 77


_MAX_LINE = 2000  # characters


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; the path and the reason of an OSError.

    Libraries put what they have read into their messages; of a long one the middle is left out.
    """
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 200]} ... {line[-195:]}"
