"""Which implementation runs, and what doors say of arguments that do not fit."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import require, require_if, set_flag


def test_the_implementation_asked_for():
    x = torch.ones(2)
    both = {"reference": "slow", "triton": "fast"}
    assert dispatch.implementation("op", x, None, **both) == "slow"  # on the CPU
    assert dispatch.implementation("op", x, "reference", **both) == "slow"
    if dispatch.INTERPRETING:
        assert dispatch.implementation("op", x, "triton", **both) == "fast"
    with pytest.raises(KernelError, match="op: .*'cusparselt', expected one of reference, triton"):
        dispatch.implementation("op", x, "cusparselt", **both)
    with pytest.raises(KernelError, match="expected one of reference, cusparselt"):
        dispatch.implementation("op", x, "triton", reference="slow", cusparselt="fast")
    with pytest.raises(KernelError, match="backend='cusparselt' cannot run: .* needs CUDA"):
        dispatch.implementation("op", x, "cusparselt", reference="slow", cusparselt="fast")


def test_tensors_of_another_kind_are_named():
    x, cpu = torch.ones(2, 3), torch.device("cpu")
    require("op", "x", x, torch.float32, (2, 3), cpu)
    require("op", "x", None, torch.float32, (2, 3), cpu)
    for one in (torch.ones(()), torch.ones(1), torch.ones(1, 1)):
        require("op", "x", one, torch.float32, None, cpu)
    for wrong in ((torch.float16, (2, 3)), (torch.float32, (3, 2)), (torch.float32, None)):
        with pytest.raises(KernelError, match="op: x is a torch.float32 tensor of shape .2, 3."):
            require("op", "x", x, *wrong, cpu)
    with pytest.raises(KernelError, match=r"on cpu, expected torch.float32 \(2, 3\) on meta"):
        require("op", "x", x, torch.float32, (2, 3), torch.device("meta"))
    require_if(True, "op", "x", x, "here")
    require_if(False, "op", "x", None, "here")
    with pytest.raises(KernelError, match="op: x is missing, expected one here"):
        require_if(True, "op", "x", None, "here")
    with pytest.raises(KernelError, match="op: x is given, expected none here"):
        require_if(False, "op", "x", x, "here")


def test_a_flag_is_only_raised():
    flag = torch.zeros(1, dtype=torch.int32)
    set_flag(flag, torch.tensor(True))
    set_flag(flag, torch.tensor(False))
    set_flag(None, torch.tensor(True))
    assert flag.item() == 1
