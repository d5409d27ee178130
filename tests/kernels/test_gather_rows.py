"""Tokens as rows, in full and in 8 bits: what indexing, quantizing and transposing give."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels.float8 import blocks_of, quantize
from megasparse.kernels.gather_rows import gather_float8, gather_rows, sum_rows
from tests.kernels.gated_cases import BF16, E4M3, FP16, bits, scalar
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]
F32 = torch.float32


def _sources(rows: int, tokens: int) -> torch.Tensor:
    """Some twice, some never; holes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-1, tokens, (rows,), generator=generator, dtype=torch.int32)


def _rows(x: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return padded[sources.long()]  # -1 is the last


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "rows", "shape", "dtype"),
    [
        (7, 12, (136,), BF16),
        (300, 700, (), torch.float32),
        (1, 4, (3, 200), FP16),
        (0, 5, (8,), BF16),
    ],
)
def test_rows_are_their_sources(device, monkeypatch, tokens, rows, shape, dtype, backend):
    x = torch.randn(tokens, *shape).to(dtype).to(device)
    sources = (_sources(rows, tokens) if tokens else torch.full((rows,), -1).int()).to(device)
    expected = _rows(x, sources)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found = gather_rows(x, sources, backend=backend)
    assert found.dtype == dtype and torch.equal(found, expected)
    if tokens > 1 and x.dim() == 2:  # columns of a wider tensor
        assert torch.equal(gather_rows(torch.cat([x, x], 1)[:, : x.shape[1]], sources), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "each", "width", "dtype"), [(9, 2, 136, F32), (70, 3, 64, BF16), (0, 2, 8, BF16)]
)
def test_sums_of_rows_are_rounded_once(device, monkeypatch, tokens, each, width, dtype, backend):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(3 * tokens * each + 1, width, generator=generator).to(dtype)
    spots = torch.randperm(len(rows), generator=generator)[: tokens * each]
    parts = torch.randperm(tokens * each, generator=generator).view(tokens, each).int()
    parts[tokens // 2 :, -1:] = -1
    padded = torch.cat([spots, torch.tensor([len(rows)])])
    wide = torch.cat([rows, rows.new_zeros(1, width)]).float()[padded[parts.long()]]
    expected = wide[:, 0]
    for number in range(1, each):
        expected = expected + wide[:, number]
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found = sum_rows(*(t.to(device) for t in (rows, spots, parts)), backend=backend)
    assert torch.equal(found.cpu(), expected.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize(("counts", "dtype"), [([256, 0, 128], BF16), ([128, 384], FP16)])
def test_operands_are_the_rows_quantized(device, monkeypatch, counts, dtype, gathered, backend):
    rows, tokens = sum(counts), 50 if gathered else sum(counts)
    x = torch.randn(tokens, 192).to(dtype).to(device)
    sources = _sources(rows, tokens).to(device) if gathered else None
    wide = x if sources is None else _rows(x, sources)
    scale, amax = scalar(200.0, device), scalar(0.0, device).view(1)
    how = {"scale": scale, "backend": backend}
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        found, blocks = gather_float8(x, sources, counts, amax=amax, **how)
    expected = quantize(wide, scale, E4M3)
    assert torch.equal(bits(found), bits(expected)) and amax == wide.float().abs().max()
    parts = bits(expected).split(counts)
    for block, part in zip(blocks_of(blocks, counts), parts, strict=True):
        assert block.is_contiguous() and torch.equal(bits(block), part.t())
    amax.fill_(1e9)
    strided = torch.cat([x, x], 1)[:, :192]
    again, none = gather_float8(strided, sources, counts, amax=amax, transposed=False, **how)
    assert none is None and torch.equal(bits(again), bits(found)) and amax == 1e9


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(device, backend):
    x = torch.zeros(3, 64, device=device, dtype=BF16)
    x[2, 5] = float("nan")
    sources = torch.full((128,), -1, dtype=torch.int32, device=device)
    sources[9] = 2
    amax = torch.zeros(1, device=device)
    rows, blocks = gather_float8(
        x, sources, [128], scale=scalar(1.0, device), amax=amax, backend=backend
    )
    assert rows.float()[9, 5].isnan() and blocks.float().view(64, 128)[5, 9].isnan()
    assert int(rows.float().isnan().sum()) == 1 and amax.isnan()


@pytest.mark.gpu
def test_on_a_gpu_at_the_size_of_a_layer(device):
    counts = [4096, 0, 8192 + 128, 640]
    x = torch.randn(6000, 2048, device=device).to(BF16)
    sources = _sources(sum(counts), 6000).to(device)
    expected = _rows(x, sources)
    assert torch.equal(gather_rows(x, sources), expected)
    parts = torch.randperm(sum(counts)).to(device)[: 6000 * 2].view(6000, 2)
    spots = torch.randperm(sum(counts)).to(device)
    both = expected.float()[spots[parts]]
    assert torch.equal(sum_rows(expected, spots, parts.int()), (both[:, 0] + both[:, 1]).to(BF16))
    rows, blocks = gather_float8(x, sources, counts, scale=scalar(100.0, device))
    expected = bits(quantize(expected, scalar(100.0, device), E4M3))
    assert torch.equal(bits(rows), expected)
    for block, part in zip(blocks_of(blocks, counts), expected.split(counts), strict=True):
        assert torch.equal(bits(block), part.t())


def test_refusals():
    x, one, sources = torch.zeros(4, 64).half(), torch.ones(()), torch.zeros(128).int()
    with pytest.raises(KernelError, match="sources is a"):
        gather_rows(x, sources.long())
    with pytest.raises(KernelError, match="expected matrices"):
        sum_rows(x, sources.long(), sources)
    with pytest.raises(KernelError, match="parts is a"):
        sum_rows(x, sources.long(), sources.long()[:, None])
    for wrong in (x.float(), x[:, :40], x[0]):
        with pytest.raises(KernelError, match="gather_float8: x is"):
            gather_float8(wrong, sources, [128], scale=one)
    for counts in ([64, 64], [256], [256, -128]):
        with pytest.raises(KernelError, match="in multiples of 128"):
            gather_float8(x, sources, counts, scale=one)
    with pytest.raises(KernelError, match="rows of 4, expected all"):
        gather_float8(x, None, [128], scale=one)
