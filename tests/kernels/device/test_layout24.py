"""What only a GPU's compiler sees of the packing kernels, run in the interpreter all the same.

On a GPU kept entries, masks and columns of 4x4 blocks are picked by PTX's byte permutation. Here
the kernels take the GPU's branch, with the permutation as it is spelt out for the interpreter.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from megasparse.kernels import pack24, transposable24_mask, weight_pack24
from megasparse.kernels.device import layout24 as layout
from megasparse.kernels.dispatch import INTERPRETING


@pytest.fixture
def gpu_branch(monkeypatch):
    if not INTERPRETING:
        pytest.skip("on a GPU the branch runs by itself")
    monkeypatch.setattr(layout, "_INTERPRETING", layout.tl.constexpr(False))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_weights_by_byte_permutation(gpu_branch, dtype):
    w = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    w[:, ::5] = 0.0
    mask = transposable24_mask(w)
    scale = torch.tensor(100.0) if dtype.itemsize == 1 else None
    results = [
        weight_pack24(w, mask, dtype=dtype, scale=scale, backend=backend)
        for backend in ("reference", "triton")
    ]
    for expected, packed in zip(*results):
        assert torch.equal(packed.buffer, expected.buffer)


def test_every_case_of_e4m3_groups(gpu_branch):
    groups = [g for g in itertools.product([0.0, 1.0, -2.0], repeat=4) if g.count(0.0) >= 2]
    w = torch.zeros(64 * 32, 4)
    w[: len(groups)] = torch.tensor(groups)
    w = w.view(64, 128).to(torch.float8_e4m3fn)
    expected = pack24(w, backend="reference")
    assert torch.equal(pack24(w, backend="triton").buffer, expected.buffer)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_tables_name_what_pack24_names(bits):
    """Each case of non-zeros, through the numbers that the kernels give it."""
    for nonzero in itertools.product([0, 1], repeat=4):
        w = torch.zeros(64, 64, dtype=torch.bfloat16)
        w[0, :4] = torch.tensor(nonzero)
        if sum(nonzero) > 2:
            continue
        code = int(pack24(w).metadata[0]) & 15
        if bits == 8:
            number = sum(n << i for i, n in enumerate(nonzero))
            table = layout._CODES8
        else:
            number = nonzero[2] | nonzero[0] << 1 | nonzero[3] << 2 | nonzero[1] << 3
            table = layout._CODES16
        assert table.value >> 4 * number & 15 == code
