"""What others of this host could change of a run, and secrets that a run would show them.

A run writes as the umask says, into folders that only their owner can open (`make_private`). What
it reads may be anybody's: it says in one line which of that others can write.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import megasparse
from megasparse.config import ResolvedConfig
from megasparse.data.check import CheckedData
from megasparse.errors import ConfigError

MAX_NAMED = 5


def exposed_inputs(
    config: ResolvedConfig, data: CheckedData, configs: Sequence[str] = ()
) -> str | None:
    """The line for a run whose code or inputs others can change; None: they cannot.

    Others are all users of the host; a group that shares its data is not told.

    Args:
        configs: YAML files of the command line.
    """
    settings = config.checkpoint
    read = [config.data.tokenizer_model, config.parallel.deepspeed_config, *configs]
    read += [settings.load, settings.load_hf, config.distillation.teacher_load]
    read += [settings.run_dir, settings.save]
    for group in data.sources.values():
        read += [f"{source.prefix}{end}" for source in group for end in (".bin", ".idx")]
    code = [Path(megasparse.__file__).parent, Path(sys.argv[0])]
    kernels = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    found = {str(path): _why(Path(path)) for path in [*code, kernels, *filter(None, read)]}
    if not found[str(kernels)]:
        found[str(kernels)] = _foreign(Path(kernels))  # compiled, and run
    told = [f"{path} ({why})" for path, why in found.items() if why]
    if not told:
        return None
    more = f", and {len(told) - MAX_NAMED} more" if len(told) > MAX_NAMED else ""
    return (
        f"others can change what this run reads or runs: {', '.join(told[:MAX_NAMED])}{more}; "
        "chmod o-w, or use a copy of your own"
    )


def check_no_secrets(config: ResolvedConfig) -> None:
    """Refuse a password in a setting: lists of processes and saved settings show it.

    Raises:
        ConfigError: names the setting, and where the password belongs; not the password.
    """
    uri = config.logging.mlflow_tracking_uri
    try:
        parts = urlsplit(uri or "")
        named = parts.scheme in ("http", "https") and parts.username  # a token, perhaps
        secret = parts.password is not None or named
    except ValueError:  # MLflow will say what is wrong with it
        return
    if secret:
        raise ConfigError(
            "mlflow_tracking_uri: found a user or password in it, which process lists and the "
            "run's saved settings would show; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI, in the environment"
        )


def _why(path: Path) -> str | None:
    """By which permission all users can change a file or folder, or put another in its place."""
    try:
        status = path.stat()
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"mode {stat.S_IMODE(status.st_mode):o}"
        above = Path(os.path.realpath(path)).parent
        mode = above.stat().st_mode
    except OSError:  # the check of the file itself says so
        return None
    shared = mode & stat.S_IWOTH and not mode & stat.S_ISVTX
    return f"mode {stat.S_IMODE(mode):o} of {above}" if shared else None


def _foreign(path: Path) -> str | None:
    """Whether a folder belongs to another user, who could have made it first."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return None
    return f"of user {owner}" if owner not in (0, os.getuid()) else None
