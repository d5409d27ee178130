"""The e4m3 scale of a tensor: its largest magnitude found wherever it is."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import amax_scale
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_magnitude_is_found_anywhere(device, dtype, backend, monkeypatch):
    """At the edges of tiles and of the matrix, in strided rows whose other entries are larger."""
    whole = torch.randn(131, 1536, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    whole[:, 1403:] = 1000.0
    for row, column in ((0, 0), (63, 1023), (64, 1024), (130, 1402), (7, 1023), (8, 1024)):
        w = whole.clone()[:, :1403]
        w[row, column] = -100.0
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            scale = amax_scale(w, backend=backend)
        assert scale.shape == () and scale.dtype == torch.float32
        expected = torch.tensor(100.0) / torch.tensor(448.0)
        assert torch.equal(scale.cpu(), expected)
    assert torch.equal(amax_scale(w.t(), backend=backend).cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_tensors(device, dtype, backend):
    w = torch.zeros(5, 7, dtype=dtype, device=device)
    assert amax_scale(w, backend=backend) == 1
    w[4, 6] = 6e-8 if dtype == torch.float16 else 1e-40
    smallest = amax_scale(w, backend=backend)
    assert smallest > 0 and smallest.reciprocal().isfinite()
    w[0, 0] = -float("inf")
    assert amax_scale(w, backend=backend) == float("inf")
    w[2, 3] = float("nan")
    assert amax_scale(w, backend=backend).isnan()


def test_refusals(device):
    for w in (torch.ones(4), torch.ones(0, 4), torch.ones(4, 4, dtype=torch.float64)):
        with pytest.raises(KernelError, match="expected a non-empty matrix"):
            amax_scale(w.to(device))
    with pytest.raises(KernelError, match="expected one of reference, triton"):
        amax_scale(torch.ones(4, 4, device=device), backend="cusparselt")
