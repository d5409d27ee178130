"""A seed in the device's memory, which a captured kernel reads anew, draws what the int draws."""

from __future__ import annotations

import inspect

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import activation_grad_pack24, grad_pack24, mvue24, mvue_pack24

SEED = (7 << 40) + 5


def draw(op, seed, device, **arguments):
    """All bytes that `op` gives for one gradient (128, 64), or for one of a fused projection."""
    generator = torch.Generator().manual_seed(2)
    dz = torch.randn(128, 128, generator=generator).to(device, torch.bfloat16)
    if op in (grad_pack24, activation_grad_pack24):
        arguments |= {"packed_scale": torch.ones((), device=device), "row_dtype": None}
    tensors = (dz[:, :64].contiguous(), dz) if op is activation_grad_pack24 else (dz,)
    found = op(*tensors, seed=seed, **arguments)
    found = found[1] if isinstance(found, tuple) else found
    return found.view(torch.uint8) if isinstance(found, torch.Tensor) else found.buffer


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("op", [mvue24, mvue_pack24, grad_pack24, activation_grad_pack24])
def test_it_is_the_same_as_an_int(device, op, backend):
    arguments = {"exact": backend == "triton", "backend": backend}
    expected = draw(op, SEED, device, **arguments)
    seed = torch.tensor(SEED, device=device)
    for tensor in (seed, seed.view(1)):
        assert torch.equal(draw(op, tensor, device, **arguments), expected)
    seed.add_(1)  # in place, as a step that was captured does
    assert not torch.equal(draw(op, seed, device, **arguments), expected)
    assert "int64 tensor, 0-d or (1,)" in inspect.getdoc(op)


@pytest.mark.parametrize("op", [mvue24, mvue_pack24, grad_pack24, activation_grad_pack24])
def test_others_are_refused(device, op):
    for wrong in (torch.ones(2, dtype=torch.int64), torch.ones((), dtype=torch.int32)):
        with pytest.raises(KernelError, match=f"{op.__name__}: seed is a torch.int"):
            draw(op, wrong.to(device), device)
