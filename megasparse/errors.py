"""Error classes with exit codes.

Every error that a user can cause is a `MegasparseError` whose message is one line that names the
field or file, what was found and what was expected. `launch/` prints that line on every rank and
exits with the class's `exit_code`; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class MegasparseError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


class ConfigError(MegasparseError):
    """A flag, YAML key or combination of them is wrong (sizes, names, unknown keys)."""

    exit_code = 2


class DataError(MegasparseError):
    """A corpus, tokenizer or dataset file is missing, damaged, or does not fit the run."""

    exit_code = 3


class CheckpointError(MegasparseError):
    """A checkpoint is missing, damaged, or belongs to another run."""

    exit_code = 4


class NumericsError(MegasparseError):
    """A NaN or an infinity where training cannot go on."""

    exit_code = 5


class KernelError(MegasparseError, ValueError):
    """A kernel was asked for shapes, dtypes or a backend that it cannot run."""

    exit_code = 6


class ReplicaError(MegasparseError):
    """Ranks that must hold the same parameters, masks or scales do not."""

    exit_code = 72
