"""Operands of all experts of a layer in one launch: what each expert alone would get."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import (
    PackedStack,
    grad_pack24_experts,
    mvue24,
    mvue_pack24_experts,
    pack24,
    prune24_mask,
    transposable24_mask,
    weight_pack24,
    weight_pack24_experts,
)
from megasparse.kernels.float8 import quantize

BACKENDS = ["reference", "triton"]
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
E = 3


def bits(t):
    return t.contiguous().view(torch.int16 if t.dtype.itemsize == 2 else torch.int8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", ["packed", "double-pruned", "dense", None])
@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_each_is_what_packing_it_alone_gives(device, backend, transposed, dtype):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(E * 128, 256, generator=generator).to(BF16).to(device)
    soft = transposed in ("double-pruned", None)
    mask = None if soft else transposable24_mask(w)
    beta = torch.tensor([1.0, 0.5, 3.0], device=device) if soft else None
    scale = torch.tensor(16.0, device=device) if dtype == E4M3 else None
    amax, alone = (torch.zeros(1, device=device) for _ in range(2))
    given = {"dtype": dtype, "scale": scale, "transposed": transposed}
    out = None
    for factor in (2.0, 1.0):  # the second time in place
        found = weight_pack24_experts(
            factor * w,
            E,
            mask,
            threshold_scale=beta,
            amax=amax.zero_(),
            out=out,
            backend=backend,
            **given,
        )
        assert out is None or found is out
        out = found
    stack, others = out
    assert stack.buffer.is_contiguous() and len(stack.each) == E
    for n in range(E):
        own = slice(128 * n, 128 * (n + 1))
        packed, other = weight_pack24(
            w[own],
            None if mask is None else mask[own],
            threshold_scale=None if beta is None else beta[n],
            amax=alone,
            backend="reference",
            **given,
        )
        assert stack.each[n].in_one_buffer and torch.equal(stack.buffer[n], packed.buffer)
        assert stack.each[n].scale == packed.scale
        if isinstance(others, PackedStack):
            assert torch.equal(others.each[n].buffer, other.buffer)
        elif others is not None:
            assert torch.equal(bits(others[n]), bits(other))
    assert torch.equal(amax, alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_is_not_24_and_wrong_shapes(device, backend):
    w = torch.ones(2 * 64, 64, device=device).bfloat16()
    mask = prune24_mask(w)
    mask[70, :3] = True
    with pytest.raises(KernelError, match="row 70, columns 0 to 3"):
        weight_pack24_experts(w, 2, mask, transposed=None, backend=backend)
    with pytest.raises(KernelError, match="rows of 3 experts"):
        weight_pack24_experts(w, 3, mask, backend=backend)
    with pytest.raises(KernelError, match=r"expected \(2,\)"):
        beta = torch.ones(1, device=device)
        weight_pack24_experts(w, 2, threshold_scale=beta, transposed=None, backend=backend)
    with pytest.raises(KernelError, match="multiples of"):
        weight_pack24_experts(w, 4, mask, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("counts", [[256, 0, 128], [128, 384]])
def test_draws_of_all_experts_are_those_of_each(device, backend, exact, counts):
    """Two sections of channels; groups draw by any numbers."""
    generator = torch.Generator().manual_seed(4)
    tokens = sum(counts)
    dz = (torch.randn(tokens, 128, generator=generator) * 1e-3).bfloat16().to(device)
    groups = torch.randperm(1 << 12, generator=generator)[: tokens // 4].to(device)
    groups += 1 << 31  # beyond int32
    scales = {"row_scale": torch.tensor(2.0**14, device=device)}
    scales["packed_scale"] = torch.tensor(2.0**12, device=device)
    row_amax, packed_amax = (torch.zeros(1, device=device) for _ in range(2))
    channels = ((0, 0, 64), (64, 640, 64))
    row, packed = grad_pack24_experts(
        dz,
        counts,
        groups,
        seed=9,
        row_dtype=E4M3,
        channels=channels,
        exact=exact,
        row_amax=row_amax,
        packed_amax=packed_amax,
        backend=backend,
        **scales,
    )
    drawn = torch.cat(
        [
            mvue24(
                dz[:, a : a + n].float(), seed=9, dim=0, offsets=(0, b), exact=exact, groups=groups
            )
            for a, b, n in channels
        ],
        1,
    )
    assert torch.equal(bits(row), bits(quantize(dz, scales["row_scale"], E4M3)))
    assert row_amax == dz.float().abs().max()
    assert float(packed_amax) == pytest.approx(float(drawn.abs().max()), rel=1e-6)
    places = [part.buffer.data_ptr() for part in packed if part.shape[1]]
    assert places == sorted(places)
    for part, own in zip(packed, drawn.split(counts), strict=True):
        assert part.shape == (128, len(own))
        assert part.scale == 2.0**-12
        if not len(own):
            continue
        alone = pack24(quantize(own.t(), scales["packed_scale"], E4M3).contiguous())
        assert part.in_one_buffer
        if exact:  # the approximation's probabilities differ in their last bit
            assert torch.equal(part.buffer, alone.buffer)
        else:
            assert (bits(part.stored()) != bits(alone.stored())).float().mean() < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [True, False])
def test_draws_in_16_bits_are_those_of_each(device, backend, exact):
    generator = torch.Generator().manual_seed(5)
    counts = [64, 0, 192]
    dz = torch.randn(256, 128, generator=generator).bfloat16().to(device)
    groups = torch.randperm(1 << 12, generator=generator)[:64].to(device)
    channels = ((0, 0, 64), (64, 640, 64))
    packed = mvue_pack24_experts(
        dz, counts, groups, seed=9, channels=channels, exact=exact, backend=backend
    )
    sections = [
        mvue24(dz[:, a : a + n], seed=9, dim=0, offsets=(0, b), exact=exact, groups=groups)
        for a, b, n in channels
    ]
    for part, own in zip(packed, torch.cat(sections, 1).split(counts), strict=True):
        assert part.shape == (128, len(own))
        if not len(own):
            continue
        alone = pack24(own.t().contiguous())
        if exact:
            assert part.in_one_buffer and torch.equal(part.buffer, alone.buffer)
        else:
            assert (bits(part.dense()) != bits(alone.dense())).float().mean() < 2e-3
    with pytest.raises(KernelError, match="in multiples of 64"):
        mvue_pack24_experts(dz, [32, 224], groups, seed=0)


def test_wrong_counts_of_tokens(device):
    one = torch.ones((), device=device)
    dz = torch.ones(256, 64, device=device).bfloat16()
    groups = torch.arange(64, device=device)
    for counts in ([128, 64, 64], [128], [384, -128]):
        with pytest.raises(KernelError, match="in multiples of 128"):
            grad_pack24_experts(dz, counts, groups, seed=0, row_dtype=None, packed_scale=one)
