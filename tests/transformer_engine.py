"""Transformer Engine in tests of FP8: what may be missing, and what is a failure."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from megasparse.fp8 import transformer_engine as door


def needs_transformer_engine(device: torch.device) -> None:
    """Skip what runs through Transformer Engine, on a GPU where it cannot.

    GPUs before Hopper have no FP8 that it could use: nothing to test. It is an extra
    (`pip install megasparse[gpu]`) that BF16 does without, so whoever runs pytest without it sees
    skips; `make test` installs it on a GPU machine, and sets MEGASPARSE_REQUIRE_TRANSFORMER_ENGINE,
    with which its absence is a failure. Installed and broken always is: a skip would hide that
    nothing of FP8 is tested. On the CPU the same tests run by the definition.
    """
    if device.type != "cuda" or (reason := door.refusal(device)) is None:
        return
    if torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip(reason)
    required = os.environ.get("MEGASPARSE_REQUIRE_TRANSFORMER_ENGINE")
    if find_spec("transformer_engine") is None and not required:
        pytest.skip("Transformer Engine, of the extra [gpu], is not installed")
    pytest.fail(reason)
