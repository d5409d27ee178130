"""S-STE's projection: values, continuity, the scale; agreement of the backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megasparse.errors import KernelError, NumericsError
from megasparse.kernels import (
    is_24,
    s_ste_scale,
    scale_from_sums,
    soft_threshold24,
    soft_threshold24_with_sums,
)
from tests.kernels.mask_cases import BACKENDS, SHAPES, WIDE, assert_same_bits, poison_empty, weights

# The interpreter computes inf - inf in lanes whose result is not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def fp64_oracle(w: torch.Tensor) -> np.ndarray:
    groups = w.double().numpy().reshape(-1, 4)
    threshold = np.sort(np.abs(groups), axis=1)[:, 1:2]
    shrunk = np.sign(groups) * np.maximum(np.abs(groups) - threshold, 0)
    return shrunk.reshape(w.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_values(
    backend: str, dtype: torch.dtype, kind: str, device: torch.device, monkeypatch
) -> None:
    for seed, shape in enumerate(SHAPES):
        w = weights(kind, shape, dtype, seed)
        with monkeypatch.context() as patch:
            poison_empty(patch)
            s = soft_threshold24(w.to(device), backend=backend)
        assert s.dtype == dtype and s.shape == w.shape
        # fp64 differences of two numbers of `dtype` round to fp32 and to `dtype` as they would
        # round at once but for ties, which random 24-bit numbers do not hit at bf16 and fp16.
        expected = torch.from_numpy(fp64_oracle(w)).to(torch.float32).to(dtype)
        assert torch.equal(s.cpu(), expected)
        assert is_24(s)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", ["normal", "ties", "extreme"])
def test_backends_agree_bit_for_bit(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    for seed, shape in enumerate(SHAPES):
        w = weights(kind, shape, dtype, seed).to(device)
        s = soft_threshold24(w, backend="triton")
        assert_same_bits(s, soft_threshold24(w, backend="reference"))
        negative_zero = (s == 0) & torch.signbit(s)
        assert not negative_zero.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_edge_groups(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    inf = float("inf")
    cases = [
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([0, -3, 0, 0], [0, -3, 0, 0]),  # one non-zero: unchanged
        ([1, -1, 1, 1], [0, 0, 0, 0]),
        ([3, -2, 2, 1], [1, 0, 0, 0]),  # second and third equal: three zeros
        ([-4, 1, 2, 3], [-2, 0, 0, 1]),
        ([inf, 1, 2, -3], [inf, 0, 0, -1]),
        ([inf, -inf, 2, 3], [inf, -inf, 0, 0]),
        ([inf, -inf, inf, 3], [0, 0, 0, 0]),  # the threshold is infinite
    ]
    w = torch.tensor([case[0] for case in cases], dtype=dtype, device=device)
    s = soft_threshold24(w, backend=backend)
    assert s.tolist() == [[float(x) for x in case[1]] for case in cases]


@pytest.mark.parametrize("backend", BACKENDS)
def test_continuous(backend: str, device: torch.device) -> None:
    """A change of at most d in every entry changes the result by at most 2 d, also where near-equal
    magnitudes swap their order (a hard 2:4 mask jumps there)."""
    w = weights("normal", (64, 512), torch.float32).view(-1, 4)
    order = w.abs().argsort(dim=1)
    middle = order[:, 1:3]  # make the second and third magnitudes nearly equal, signs kept
    low = w.abs().gather(1, middle[:, :1])
    near = torch.cat([low, low * (1 + 1e-6)], dim=1)
    w = w.scatter(1, middle, torch.copysign(near, w.gather(1, middle)))
    step = 1e-5
    noise = torch.rand(w.shape, generator=torch.Generator().manual_seed(9)) * 2 - 1
    moved = w + step * noise
    swapped = (moved.abs().argsort(dim=1) != w.abs().argsort(dim=1)).any(dim=1)
    assert swapped.float().mean() > 0.3
    before = soft_threshold24(w.to(device), backend=backend)
    after = soft_threshold24(moved.to(device), backend=backend)
    assert (after - before).abs().max() <= 2 * step + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_scale_is_the_least_squares_fit(
    backend: str, dtype: torch.dtype, device: torch.device, monkeypatch
) -> None:
    for shape in SHAPES:
        w = weights("normal", shape, dtype)
        with monkeypatch.context() as patch:
            poison_empty(patch)
            scale = s_ste_scale(w.to(device), backend=backend)
        assert (
            scale.dtype == torch.float32 and scale.shape == () and scale.device.type == device.type
        )
        s = soft_threshold24(w, backend="reference").double()
        expected = (w.double() * s).sum() / (s * s).sum()
        assert scale.item() == pytest.approx(expected.item(), rel=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_scales(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(11)
    normal = torch.randn(512, 1024, generator=generator).to(device) * 0.02
    assert s_ste_scale(normal, backend=backend).item() == pytest.approx(1.483, abs=0.01)
    uniform = torch.rand(512, 1024, generator=generator).to(device) * 2 - 1
    assert s_ste_scale(uniform, backend=backend).item() == pytest.approx(1.750, abs=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_without_a_projection_is_one(backend: str, device: torch.device) -> None:
    assert s_ste_scale(torch.ones(8, 16, device=device), backend=backend).item() == 1.0
    assert s_ste_scale(torch.zeros(8, 16, device=device), backend=backend).item() == 1.0
    assert s_ste_scale(torch.zeros(0, 16, device=device), backend=backend).item() == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_of_shards(backend: str, device: torch.device) -> None:
    w = weights("normal", (64, 256), torch.float32).to(device)
    whole = s_ste_scale(w, backend=backend).item()
    sums: list[torch.Tensor] = []

    def record(local: torch.Tensor) -> None:
        assert local.shape == (2,) and local.dtype == torch.float64
        sums.append(local.clone())

    for shard in w.tensor_split(4, dim=1):
        s_ste_scale(shard, record, backend=backend)
    total = torch.stack(sums).sum(0)

    def sum_in_place(local: torch.Tensor) -> None:
        local.copy_(total)

    returned = s_ste_scale(w[:, :64], lambda local: total, backend=backend)
    in_place = s_ste_scale(w[:, :64], sum_in_place, backend=backend)
    assert returned.item() == pytest.approx(whole, rel=1e-6)
    assert in_place.item() == returned.item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_sums_in_the_same_pass(
    backend: str, dtype: torch.dtype, device: torch.device, monkeypatch
) -> None:
    # On a GPU a program sums several blocks: sizes around that, and one that needs few of them.
    for shape in ((132, 508), (4, 4), (1, 4 * 4 * 4096 + 4), (65, 1024)):
        w = weights("normal", shape, dtype).to(device)
        with monkeypatch.context() as patch:
            poison_empty(patch)
            s, sums = soft_threshold24_with_sums(w, backend=backend)
        assert_same_bits(s, soft_threshold24(w, backend="reference"))
        wide, projected = w.double(), s.double()
        expected = torch.stack([(wide * projected).sum(), (projected * projected).sum()])
        torch.testing.assert_close(sums, expected, rtol=2e-6, atol=0)
        scale = s_ste_scale(w, backend=backend)
        assert torch.equal(scale_from_sums(sums), scale)  # the same sums, bit for bit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_nan_is_an_error(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    w = weights("normal", (24, 1500), dtype).to(device)
    w[17, 1203] = float("nan")
    for function in (soft_threshold24, s_ste_scale):
        with pytest.raises(NumericsError, match=r"\(24, 1500\), first at \(17, 1203\)"):
            function(w, backend=backend)
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        function(w[:16], backend="triton", nan_flag=flag)
        assert flag.item() == 0
        function(w, backend="triton", nan_flag=flag)
        assert flag.item() == 1


def test_strides_and_refusals(device: torch.device) -> None:
    w = weights("normal", (40, 68), torch.float16).to(device)
    for view in (w.t()[:64], w[:, 4:40], w.view(-1)[1:2717]):
        expected = soft_threshold24(view.contiguous(), backend="reference")
        assert_same_bits(soft_threshold24(view, backend="triton"), expected)
    with pytest.raises(KernelError, match=r"soft_threshold24: shape \(40, 66\)"):
        soft_threshold24(w[:, :66])
    with pytest.raises(KernelError, match="s_ste_scale: dtype torch.float8_e4m3fn"):
        s_ste_scale(w.to(torch.float8_e4m3fn))
