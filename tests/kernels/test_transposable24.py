"""Transposable masks: exact best of 90 with its tie rule, symmetry, shards, NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megasparse.errors import KernelError, NumericsError
from megasparse.kernels import encode_patterns, is_24, transposable24_mask
from tests.kernels.mask_cases import (
    BACKENDS,
    SHAPES,
    WEIGHTS,
    assert_same_bits,
    poison_empty,
    weights,
)
from tests.kernels.test_patterns import brute_force_patterns

# The interpreter says so when sums become infinite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PATTERNS = np.array(brute_force_patterns(), dtype=np.float64)  # (90, 16)


def scores(w: torch.Tensor) -> np.ndarray:
    """fp64 (blocks, 90): the kept magnitude of every pattern in every 4x4 block."""
    rows, cols = w.shape
    blocks = np.abs(w.double().numpy()).reshape(rows // 4, 4, cols // 4, 4)
    flat = blocks.transpose(0, 2, 1, 3).reshape(-1, 16)
    kept = np.where(PATTERNS[None].astype(bool), flat[:, None], 0.0)  # inf * 0 would be NaN
    return kept.sum(-1)


def winners(mask: torch.Tensor) -> np.ndarray:
    return encode_patterns(mask.cpu(), transposable=True).flatten().numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_best_of_90(backend: str, dtype: torch.dtype, device: torch.device, monkeypatch) -> None:
    for seed, shape in enumerate(SHAPES):
        w = weights("normal", shape, dtype, seed)
        with monkeypatch.context() as patch:
            poison_empty(patch)
            mask = transposable24_mask(w.to(device), backend=backend)
        score, found = scores(w), winners(mask)
        best = score.max(1)
        reached = score[np.arange(len(found)), found]
        assert (reached >= best * (1 - 1e-6)).all()  # fp32 rounds the sums of near-ties
        runner_up = np.sort(score, axis=1)[:, -2]
        clear = runner_up < best * (1 - 1e-6)
        assert clear.mean() > (0.5 if dtype == torch.float8_e4m3fn else 0.8)
        assert (found == score.argmax(1))[clear].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_ties_go_to_the_first_pattern(
    backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    w = weights("ties", (132, 508), dtype)  # small integers: fp32 sums are exact
    mask = transposable24_mask(w.to(device), backend=backend)
    score = scores(w)
    assert (np.sort(score, axis=1)[:, -2] == score.max(1)).mean() > 0.3  # ties there are
    assert (winners(mask) == score.argmax(1)).all()  # numpy takes the first
    zeros = transposable24_mask(torch.zeros(4, 4).to(dtype).to(device), backend=backend)
    assert zeros.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_sums_tie(backend: str, device: torch.device) -> None:
    w = weights("normal", (64, 256), torch.float32)
    place = torch.rand(w.shape, generator=torch.Generator().manual_seed(5))
    w = torch.where(place < 0.05, torch.tensor(float("-inf")), w)
    mask = transposable24_mask(w.to(device), backend=backend)
    infinite = np.isinf(scores(w).max(1))
    assert 0.3 < infinite.mean() < 0.9
    assert (winners(mask) == scores(w).argmax(1))[infinite].all()


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("kind", ["normal", "ties", "extreme"])
def test_backends_agree_bit_for_bit(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    for seed, shape in enumerate((*SHAPES, (68, 16), (400, 4))):
        w = weights(kind, shape, dtype, seed).to(device)
        assert_same_bits(
            transposable24_mask(w, backend="triton"), transposable24_mask(w, backend="reference")
        )


def test_backends_agree_where_rounding_makes_ties(device: torch.device) -> None:
    # Magnitudes 1 + k 2^-23 beside 2^3: many patterns whose exact sums differ round to one score.
    generator = torch.Generator().manual_seed(7)
    w = 1 + torch.randint(0, 4, (256, 512), generator=generator) * 2.0**-23
    w = torch.where(torch.rand(w.shape, generator=generator) < 0.3, w * 8, w).to(device)
    mask = transposable24_mask(w, backend="triton")
    assert_same_bits(mask, transposable24_mask(w, backend="reference"))
    exact = scores(w.cpu())
    assert (winners(mask) != exact.argmax(1)).any()  # else the case tests nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_directions_and_transposition(backend: str, device: torch.device) -> None:
    w = weights("normal", (64, 128), torch.float32).to(device)
    mask = transposable24_mask(w, backend=backend)
    assert is_24(mask) and is_24(mask, dim=0)
    assert mask.sum() * 2 == mask.numel()
    score = np.sort(scores(w.cpu()), axis=1)
    assert (score[:, -2] < score[:, -1] * (1 - 1e-6)).all()  # no ties, so:
    assert_same_bits(transposable24_mask(w.t(), backend=backend), mask.t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_has_the_mask_of_its_place(backend: str, device: torch.device) -> None:
    w = weights("ties", (32, 48), torch.float32).to(device)
    whole = transposable24_mask(w, backend=backend)
    for rows, cols in ((slice(4, 20), slice(None)), (slice(None), slice(12, 40))):
        assert_same_bits(transposable24_mask(w[rows, cols], backend=backend), whole[rows, cols])
    experts = transposable24_mask(w.view(2, 16, 48), backend=backend)
    assert_same_bits(experts, whole.view(2, 16, 48))
    assert transposable24_mask(w[:0], backend=backend).shape == (0, 48)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_nan_is_an_error(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    w = weights("normal", (24, 1500), torch.float32)
    w[17, 1203] = float("nan")
    w = w.to(dtype).to(device)
    with pytest.raises(NumericsError, match=r"\(24, 1500\), first at \(17, 1203\)"):
        transposable24_mask(w, backend=backend)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    transposable24_mask(w[:16], backend="triton", nan_flag=flag)
    assert flag.item() == 0
    transposable24_mask(w, backend="triton", nan_flag=flag)
    assert flag.item() == 1


def test_wrong_shapes_are_named(device: torch.device) -> None:
    with pytest.raises(KernelError, match=r"\(6, 8\)"):
        transposable24_mask(torch.ones(6, 8, device=device))
    with pytest.raises(KernelError, match=r"\(8, 6\)"):
        transposable24_mask(torch.ones(8, 6, device=device))
    with pytest.raises(KernelError, match=r"\(8,\)"):
        transposable24_mask(torch.ones(8, device=device))
