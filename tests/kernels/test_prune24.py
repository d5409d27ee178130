"""Row-wise 2:4 masks: the tie rule, agreement of the backends, NaN, refusals; is_24."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megasparse.errors import KernelError, NumericsError
from megasparse.kernels import is_24, prune24_mask
from tests.kernels.mask_cases import (
    BACKENDS,
    SHAPES,
    WEIGHTS,
    assert_same_bits,
    poison_empty,
    weights,
)


def sorted_oracle(w: torch.Tensor) -> torch.Tensor:
    """Stable sort by magnitude, ascending: the last two of each group stay."""
    groups = np.abs(w.double().numpy()).reshape(-1, 4)
    order = np.argsort(groups, axis=1, kind="stable")
    mask = np.zeros_like(groups, dtype=bool)
    np.put_along_axis(mask, order[:, 2:], True, axis=1)
    return torch.from_numpy(mask.reshape(w.shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("kind", ["normal", "ties", "extreme"])
def test_keeps_the_two_largest(
    backend: str, dtype: torch.dtype, kind: str, device: torch.device, monkeypatch
) -> None:
    for shape in SHAPES:
        w = weights(kind, shape, dtype)
        expected = sorted_oracle(w)
        w = w.to(device)
        with monkeypatch.context() as patch:
            poison_empty(patch)
            mask = prune24_mask(w, backend=backend)
        assert_same_bits(mask, expected)
        assert bool((mask.view(-1, 4).sum(1) == 2).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_order_of_four_magnitudes(backend: str, device: torch.device) -> None:
    axes = torch.meshgrid(*[torch.arange(4.0)] * 4, indexing="ij")
    w = torch.stack(axes, dim=-1).view(-1, 4)  # all 256 tie patterns
    assert_same_bits(prune24_mask(w.to(device), backend=backend), sorted_oracle(w))
    zeros = prune24_mask(torch.zeros(4, device=device), backend=backend)
    assert zeros.tolist() == [False, False, True, True]
    signs = prune24_mask(torch.tensor([0.0, -0.0, -1.0, 0.0], device=device), backend=backend)
    assert signs.tolist() == [False, False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_offsets(backend: str, device: torch.device) -> None:
    base = weights("normal", (40, 68), torch.bfloat16).to(device)
    for w in (base.t()[:64], base[:, 4:40], base.view(-1)[1:2717], base.view(2, 20, 68)):
        assert_same_bits(prune24_mask(w, backend=backend), sorted_oracle(w.cpu().contiguous()))
    empty = prune24_mask(base[:0], backend=backend)
    assert empty.shape == (0, 68)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_has_the_mask_of_its_place(backend: str, device: torch.device) -> None:
    w = weights("ties", (16, 48), torch.float32).to(device)
    whole = prune24_mask(w, backend=backend)
    for rows, cols in ((slice(0, 4), slice(None)), (slice(None), slice(12, 40))):
        assert_same_bits(prune24_mask(w[rows, cols], backend=backend), whole[rows, cols])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_nan_is_an_error(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    w = weights("normal", (12, 1400), torch.float32)
    w[7, 1399] = float("nan")
    w[9, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"\(12, 1400\), first at \(7, 1399\)"):
        prune24_mask(w.to(dtype).to(device), backend=backend)


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_nan_flag(dtype: torch.dtype, device: torch.device) -> None:
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    w = weights("extreme", (12, 1400), dtype).float()
    prune24_mask(w.to(dtype).to(device), backend="triton", nan_flag=flag)
    assert flag.item() == 0
    w[11, 1398] = -float("nan")
    prune24_mask(w.to(dtype).to(device), backend="triton", nan_flag=flag)
    assert flag.item() == 1
    prune24_mask(torch.ones(4, device=device), backend="triton", nan_flag=flag)
    assert flag.item() == 1  # stays until the caller clears it


def test_a_reference_on_cpu_raises_despite_a_flag() -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NumericsError):
        prune24_mask(torch.full((4, 4), float("nan")), backend="reference", nan_flag=flag)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    w = torch.ones(4, 6, device=device)
    with pytest.raises(KernelError, match=r"prune24_mask: shape \(4, 6\)"):
        prune24_mask(w)
    with pytest.raises(KernelError, match="float64"):
        prune24_mask(w.double())
    with pytest.raises(KernelError, match="shape \\(\\)"):
        prune24_mask(w[0, 0])
    with pytest.raises(KernelError, match="fast"):
        prune24_mask(w[:, :4], backend="fast")
    with pytest.raises(KernelError, match="nan_flag"):
        prune24_mask(w[:, :4], nan_flag=torch.zeros(1, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*WEIGHTS, torch.bool])
def test_is_24(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    w = torch.randn(16, 1500, generator=torch.Generator().manual_seed(3))
    kept = w * prune24_mask(w)
    pruned = kept.to(dtype).to(device)
    assert is_24(pruned, backend=backend)
    assert not is_24(pruned, dim=0, backend=backend)
    assert is_24(pruned.t(), dim=0, backend=backend)
    assert not is_24(w.to(dtype).to(device), backend=backend)
    for columns in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3)):
        one_bad = kept.clone()
        one_bad[-1, -4:] = 0.0
        one_bad[-1, [-4 + column for column in columns]] = 1.0
        assert not is_24(one_bad.to(dtype).to(device), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_24_edge_values(backend: str, device: torch.device) -> None:
    assert is_24(torch.tensor([1.0, -0.0, -1.0, -0.0], device=device), backend=backend)
    nan = torch.tensor([1.0, float("nan"), 1.0, 0.0], device=device)
    assert not is_24(nan, backend=backend)
    tiny = torch.tensor([1e-45, 1e-45, 1e-45, 0.0], device=device)
    assert not is_24(tiny, backend=backend)
    assert is_24(torch.empty(0, 4, device=device), backend=backend)
    with pytest.raises(KernelError, match=r"\(5,\)"):
        is_24(torch.ones(5, device=device), backend=backend)
    with pytest.raises(KernelError, match="dim 2"):
        is_24(torch.ones(4, 4, device=device), dim=2, backend=backend)
