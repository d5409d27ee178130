"""Transformer Engine in tests of FP8: what may be missing, and what is a failure."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from megasparse import fp8


def needs_transformer_engine(device: torch.device) -> None:
    """Skip what runs through Transformer Engine, on a GPU where it cannot.

    It is an extra (`pip install megasparse[gpu]`) that BF16 does without, and older GPUs have no
    FP8. Installed on a GPU that has, it must work: otherwise this fails, for a skip would hide that
    nothing of FP8 is tested. On the CPU the same tests run by the definition.
    """
    if device.type != "cuda" or (reason := fp8.refusal(device)) is None:
        return
    if find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine, of the extra [gpu], is not installed")
    if torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip(reason)
    pytest.fail(reason)
