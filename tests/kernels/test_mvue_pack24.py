"""One pass equals the two operations it fuses, byte for byte."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import is_24, mvue24, mvue_pack24, pack24, unpack24
from tests.kernels.poison import poison_new_tensors


def _gradient(tokens, width, device, dtype=torch.float16):
    generator = torch.Generator().manual_seed(tokens + width)
    # Exact in every format, so that the interpreter's rounding of bfloat16 plays no part.
    return torch.randint(-64, 65, (tokens, width), generator=generator).to(device, dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("tokens", "width"), [(64, 64), (256, 192), (130, 128), (3, 64)])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])
def test_equals_mvue_then_pack(device, backend, tokens, width, exact, monkeypatch):
    dz = _gradient(tokens, width, device)
    pruned = mvue24(dz, seed=9, dim=0, exact=exact, backend=backend)
    expected = torch.zeros(width, -(-tokens // 64) * 64, device=device, dtype=dz.dtype)
    expected[:, :tokens] = pruned.t()
    library = pack24(expected)
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        packed = mvue_pack24(dz, seed=9, exact=exact, backend=backend)
    assert packed.shape == tuple(expected.shape)
    assert torch.equal(packed.metadata, library.metadata)
    assert torch.equal(packed.values.view(torch.int16), library.values.view(torch.int16))
    assert torch.equal(unpack24(packed), expected) and is_24(unpack24(packed))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_sections_draw_the_numbers_of_their_place(device, backend):
    dz = _gradient(128, 128, device)
    channels = ((0, 64, 64), (64, 640, 64))
    packed = mvue_pack24(dz, seed=4, channels=channels, backend=backend)
    parts = [
        mvue24(dz[:, 64 * i : 64 * i + 64].contiguous(), seed=4, dim=0, offsets=(0, place))
        for i, place in enumerate((64, 640))
    ]
    assert torch.equal(unpack24(packed), torch.cat(parts, 1).t())


# Local token 0 and the first of the second run, with their places: context parallelism's chunks.
RUNS = ((0, 64), (64, 448))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("exact", [True, False])
def test_runs_of_tokens_draw_the_numbers_of_their_place(device, backend, exact):
    whole = _gradient(512, 128, device)
    drawn = mvue24(whole, seed=4, dim=0, offsets=(0, 64), exact=exact, backend=backend)
    here = torch.cat([whole[64:128], whole[448:]])
    channels = ((0, 64, 128),)
    arguments = {"seed": 4, "channels": channels, "exact": exact, "backend": backend}
    packed = mvue_pack24(here, tokens=RUNS, **arguments)
    assert torch.equal(unpack24(packed).t(), torch.cat([drawn[64:128], drawn[448:]]))
    packed = mvue_pack24(whole[448:], tokens=((0, 448),), **arguments)
    assert torch.equal(unpack24(packed).t(), drawn[448:])
    assert not torch.equal(unpack24(mvue_pack24(whole[448:], **arguments)).t(), drawn[448:])


@pytest.mark.parametrize("runs", [(), ((4, 0),), ((0, 2),), ((0, 0), (6, 8)), ((0, 0),) * 2])
def test_runs_of_tokens_that_cut_a_group_are_refused(device, runs):
    with pytest.raises(KernelError, match="runs"):
        mvue_pack24(_gradient(64, 64, device), seed=1, tokens=runs)


def special(device, dtype):
    """All groups of nine special numbers, ties among them, each at some place: (412, 64)."""
    tiny = 2.0**-133 if dtype == torch.bfloat16 else 2.0**-24
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.5, tiny, -3 * tiny, torch.inf, torch.nan])
    groups = torch.cartesian_prod(*[numbers] * 4)
    groups = torch.cat([groups, torch.zeros(103 * 64 - len(groups), 4)]).view(103, 64, 4)
    return groups.transpose(1, 2).reshape(412, 64).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [3, 4])
def test_special_numbers(device, dtype, seed):
    """Bit for bit, signs of zeros included; of a NaN the sign is open. No group is crowded."""
    dz, flags = special(device, dtype), []
    results = []
    for backend in ("reference", "triton"):
        flags.append(torch.zeros(1, dtype=torch.int32, device=device))
        results.append(mvue_pack24(dz, seed=seed, error_flag=flags[-1], backend=backend))
    one, other = results
    assert torch.equal(one.metadata, other.metadata)
    bits, expected = other.values.view(torch.int16), one.values.view(torch.int16)
    nan = one.values.isnan()
    assert torch.equal(nan, other.values.isnan()) and nan.any()
    assert torch.equal(bits[~nan], expected[~nan])
    assert not any(flag.item() for flag in flags)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_gradients_on_a_gpu(device, dtype):
    dz = (torch.randn(1000, 512, device=device) * 1e-3).to(dtype)
    packed = mvue_pack24(dz, seed=2)
    pruned = torch.nn.functional.pad(mvue24(dz, seed=2, dim=0).t(), (0, 24))
    library = pack24(pruned.contiguous())
    assert torch.equal(packed.buffer, library.buffer)


@pytest.mark.parametrize(
    ("shape", "dtype", "channels"),
    [
        ((64, 60), torch.float16, None),
        ((64, 64), torch.float32, None),
        ((64, 128), torch.float16, ((0, 0, 64),)),
        ((64, 128), torch.float16, ((0, 0, 32), (32, 0, 96))),
        ((0, 64), torch.float16, None),
    ],
)
def test_refusals(device, shape, dtype, channels):
    with pytest.raises(KernelError, match="mvue_pack24"):
        mvue_pack24(torch.zeros(shape, dtype=dtype, device=device), seed=1, channels=channels)
