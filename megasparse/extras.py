"""The optional packages: which extra of `pip install megasparse[...]` brings each.

`pip install megasparse` brings torch, triton and numpy: kernels, `megasparse.nn`. A module that
needs more asks here, so that whoever lacks it is told what to install.
"""

from __future__ import annotations

import importlib.util

# Import name: the package's name, and the extras that have it (`setup.py`; a test compares).
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "megatron": ("megatron-core", ("train",)),
    "deepspeed": ("deepspeed", ("train",)),
    "tensorboard": ("tensorboard", ("train",)),
    "yaml": ("pyyaml", ("train", "convert")),
    "safetensors": ("safetensors", ("train", "convert")),
    "sentencepiece": ("sentencepiece", ("train", "convert")),
    "tokenizers": ("tokenizers", ("train", "convert")),
    "tqdm": ("tqdm", ("train", "convert")),
    "matplotlib": ("matplotlib", ("plot",)),
    "transformer_engine": ("transformer-engine", ("gpu",)),
    "pyarrow": ("pyarrow", ("data",)),
    "zstandard": ("zstandard", ("data",)),
}  # fmt: skip


class MissingExtraError(ImportError):
    """A package is not installed that only some uses need; the message names the extra."""

    exit_code = 64  # as a wrong setting


def advice(module: str) -> str:
    """What to type for a module that is missing."""
    return " or ".join(f"pip install 'megasparse[{extra}]'" for extra in EXTRAS[module][1])


def missing(module: str, user: str) -> MissingExtraError:
    """The error for a module that cannot be imported.

    Args:
        module: one of EXTRAS.
        user: what needs it.
    """
    package = EXTRAS[module][0]
    return MissingExtraError(f"{user} needs {package}, which is not installed: {advice(module)}")


def require(module: str, user: str) -> None:
    """Ask whether a module is installed, without importing it.

    Raises:
        MissingExtraError: it is not; the message says which extra brings it.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise missing(module, user)
