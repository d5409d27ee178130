"""Products of the packed matrices of experts are those of each alone."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import matmul24, matmul24_experts, pack24, spmm24, spmm24_experts
from tests.kernels.test_pack24 import E4M3, sparse

BF16 = torch.bfloat16
COUNTS = [128, 0, 256]


def _packed(dtype: torch.dtype, shapes: list[tuple[int, int]], device: torch.device) -> list:
    """2:4 matrices; of no columns, one in the memory of another."""
    found = []
    for number, (n, k) in enumerate(shapes):
        torch.manual_seed(number)
        one = pack24(sparse((n, max(k, 128)), dtype, device))
        if not k:
            one = type(one)(one.values[:, :0], one.metadata[:0], (n, 0), dtype, one.scale)
        found.append(one)
    return found


@pytest.mark.parametrize("dtype", [BF16, E4M3])
@pytest.mark.parametrize("alpha", [0.25, None])
def test_products_are_those_of_each_alone(device, dtype, alpha):
    packed = _packed(dtype, [(64, 128)] * 3, device)
    x = torch.randn(sum(COUNTS), 128).to(device).to(dtype)
    found = spmm24_experts(packed, x, COUNTS, alpha=alpha)
    assert found.dtype == BF16 and found.shape == (384, 64)
    for one, rows, z in zip(packed, x.split(COUNTS), found.split(COUNTS), strict=True):
        assert torch.equal(z, spmm24(one, rows, alpha=alpha))


@pytest.mark.parametrize("dtype", [BF16, E4M3])
@pytest.mark.parametrize("sliced", [False, True])
def test_sums_are_those_of_each_alone(device, dtype, sliced):
    packed = _packed(dtype, [(64, count) for count in COUNTS], device)
    transposed = dtype == E4M3
    shape = (192, sum(COUNTS)) if transposed else (sum(COUNTS), 192)
    each = torch.randn(shape).to(device).to(dtype).split(COUNTS, 1 if transposed else 0)
    if not sliced:
        each = [part.contiguous() for part in each]
    found = matmul24_experts(packed, each, transposed=transposed, alpha=0.5)
    assert found.shape == (3, 64, 192) and not found[1].any()
    for number in (0, 2):
        alone = matmul24(packed[number], each[number], transposed=transposed, alpha=0.5)
        assert torch.equal(found[number], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_on_streams_they_are_the_same(device, dtype):
    streams = [torch.cuda.Stream() for _ in range(4)]
    counts = [1024, 0, 128, 4096, 640, 256]
    packed = _packed(dtype, [(1024, 2048)] * 6, device)
    x = torch.randn(sum(counts), 2048, device=device).to(dtype)
    alone, beside = (spmm24_experts(packed, x, counts, alpha=0.5, streams=s) for s in ((), streams))
    assert torch.equal(alone, beside)
    for one, rows, z in zip(packed, x.split(counts), alone.split(counts), strict=True):
        assert torch.equal(z, spmm24(one, rows, alpha=0.5))
    sums = _packed(dtype, [(1024, n) for n in counts], device)
    each = [torch.randn(512, n, device=device).to(dtype) for n in counts]
    how = {"transposed": True, "alpha": 0.5}
    alone, beside = (matmul24_experts(sums, each, **how, streams=s) for s in ((), streams))
    assert torch.equal(alone, beside) and not alone[1].any()
    for one, part, dw in zip(sums, each, alone, strict=True):
        assert not part.shape[1] or torch.equal(dw, matmul24(one, part, **how))


def test_refusals(device):
    packed = _packed(BF16, [(64, 128)] * 2, device)
    x = torch.zeros(64, 128, dtype=BF16, device=device)
    for counts in ([64], [32, 16]):
        with pytest.raises(KernelError, match="expected one for each"):
            spmm24_experts(packed, x, counts)
    with pytest.raises(KernelError, match="expected one for each"):
        spmm24_experts(packed, x.float(), [32, 32])
    with pytest.raises(KernelError, match="expected one for each"):
        matmul24_experts(packed, [x, x])
