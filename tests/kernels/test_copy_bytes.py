"""Copies of any dtype, size and alignment."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import copy_bytes_
from tests.kernels.mask_cases import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
def test_the_same_bytes_and_no_others(device, backend, dtype):
    for size, start in ((0, 0), (1, 0), (7, 3), (4096, 0), (8193, 5), (1024, 8)):
        source = torch.randint(0, 256, (4 * size,), dtype=torch.uint8, device=device).view(dtype)
        source = source[:size]
        held = torch.full((4 * (size + start + 9),), 7, dtype=torch.uint8, device=device)
        out = held.view(dtype)[start : start + size]
        expected = held.clone()
        where = slice(start * out.element_size(), (start + size) * out.element_size())
        expected[where] = source.contiguous().view(torch.uint8)
        assert copy_bytes_(out, source, backend=backend) is out
        assert torch.equal(held, expected)


def test_refusals(device):
    x = torch.zeros(4, 6, device=device)
    for out, source in ((x, x[:2]), (x, x.half()), (x.t(), x.t()), (x[:, :2], x[:, :2])):
        with pytest.raises(KernelError, match="copy_bytes_: source is"):
            copy_bytes_(out, source)
