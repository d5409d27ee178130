"""AdamW with a masked decay: torch's AdamW without a mask, the papers' formulas with one."""

from __future__ import annotations

import itertools

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import AdamW, masked_adamw_
from megasparse.kernels.masked_adamw.arguments import APPLIES
from tests.kernels.mask_cases import BACKENDS

NUMBERS = AdamW(step=1, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
SIZES = (0, 1, 7, 1024, 4099)


def _tensors(size: int, seed: int, device: torch.device) -> list[torch.Tensor]:
    """Weight, gradient, m, v; some gradients are zero."""
    generator = torch.Generator().manual_seed(seed)
    weight, grad, m = (torch.randn(size, generator=generator) for _ in range(3))
    grad[::5] = 0.0
    v = torch.rand(size, generator=generator)
    return [t.to(device) for t in (weight, grad, m, v)]


def _mask(size: int, device: torch.device) -> torch.Tensor:
    return (torch.rand(size, generator=torch.Generator().manual_seed(9)) < 0.5).to(device)


def _papers(tensors: list[torch.Tensor], mask: torch.Tensor, n: AdamW) -> list[torch.Tensor]:
    """The update written out in float64."""
    w, g, m, v = (t.double().cpu() for t in tensors)
    decay = n.decay * (~mask.cpu()) * w
    g = n.clip * g + (0 if n.decoupled else decay)
    m = n.beta1 * m + (1 - n.beta1) * g
    u = m + (decay if n.decoupled else 0)
    squared = u if n.decoupled else g
    v = n.beta2 * v + (1 - n.beta2) * squared**2
    w = w * (1 - n.lr * n.weight_decay)
    root = (v / (1 - n.beta2**n.step)).sqrt() + n.eps
    return [w - n.lr / (1 - n.beta1**n.step) * u / root, m, v]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_papers_updates(backend: str, device: torch.device) -> None:
    for size, decoupled, step in itertools.product(SIZES, (False, True), (1, 7)):
        numbers = NUMBERS._replace(step=step, clip=0.3, decay=0.2, decoupled=decoupled)
        tensors, mask = _tensors(size, 1, device), _mask(size, device)
        expected, grad = _papers(tensors, mask, numbers), tensors[1].clone()
        copy = torch.full((size,), 9.0, dtype=torch.bfloat16, device=device)
        masked_adamw_(*tensors, numbers, mask, copy, backend=backend)
        for actual, wanted in zip((tensors[0], *tensors[2:]), expected, strict=True):
            torch.testing.assert_close(actual.double().cpu(), wanted, rtol=2e-6, atol=1e-7)
        assert torch.equal(tensors[1], grad)
        assert torch.equal(copy, tensors[0].bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_of_the_sign_is_algorithm_1_of_cast(backend: str, device: torch.device) -> None:
    """alpha mixes the momentum with lambda sign(w) where the mask is 0; v is of the mixture."""
    size, rate = 1030, 1e-2
    for step, alpha, strength in ((1, 0.0, 0.3), (4, 0.25, 0.3), (9, 1.0, 0.7)):
        tensors, mask = _tensors(size, 6, device), _mask(size, device)
        tensors[0][::7] = 0.0
        w, g, m, v = (t.double().cpu() for t in tensors)
        mu = 0.9 * m + (1 - 0.9) * 0.5 * g
        mixed = torch.empty(size, dtype=torch.float64)
        for i in range(size):
            pull = strength * ((w[i] > 0).double() - (w[i] < 0).double())
            mixed[i] = mu[i] if mask[i] else (1 - alpha) * mu[i] + alpha * pull
        v = 0.95 * v + (1 - 0.95) * mixed**2
        root = (v / (1 - 0.95**step)).sqrt() + 1e-8
        w = w - rate * (mixed / (1 - 0.9**step)) / root
        numbers = NUMBERS._replace(step=step, clip=0.5, decay=alpha * strength, weight_decay=0.0)
        numbers = numbers._replace(decoupled=True, of_sign=True, kept=1 - alpha)
        masked_adamw_(*tensors, numbers, mask, backend=backend)
        for actual, wanted in zip((tensors[0], *tensors[2:]), (w, mu, v), strict=True):
            torch.testing.assert_close(actual.double().cpu(), wanted, rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_without_a_mask_it_is_torchs(backend: str, dtype, device: torch.device) -> None:
    weight, grad, m, v = _tensors(4099, 2, device)
    m.zero_(), v.zero_()
    parameter = torch.nn.Parameter(weight.clone())
    torchs = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    copy = None if dtype is None else torch.empty(4099, dtype=dtype, device=device)
    for step in (1, 2, 3):
        parameter.grad = grad * step
        torchs.step()
        numbers = NUMBERS._replace(step=step, clip=float(step), decay=0.5)
        masked_adamw_(weight, grad, m, v, numbers, None, copy, backend=backend)
    if backend == "reference" and device.type == "cpu":
        assert torch.equal(weight, parameter)
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-5, atol=1e-7)
    assert copy is None or torch.equal(copy, weight.to(copy.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_entries_and_neighbors_are_not_decayed(backend: str, device: torch.device) -> None:
    """A piece in the middle of flat tensors; infinite weights that are kept do no harm."""
    tensors, mask = _tensors(1000, 3, device), _mask(1000, device)
    before = [t.clone() for t in tensors]
    part = slice(101, 803)
    for decay in (0.0, 0.4):
        masked_adamw_(
            *(t[part] for t in tensors), NUMBERS._replace(decay=decay), mask[part], backend=backend
        )
        results = [t.clone() for t in tensors]
        for tensor, old in zip(tensors, before, strict=True):
            assert torch.equal(tensor[:101], old[:101]) and torch.equal(tensor[803:], old[803:])
            tensor.copy_(old)
        if decay == 0.0:
            plain = results
    kept = mask[part]
    assert torch.equal(results[0][part][kept], plain[0][part][kept])
    assert not torch.equal(results[0][part][~kept], plain[0][part][~kept])


def test_many_pieces_are_one(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, mask = _tensors(4099, 4, device), _mask(4099, device)
    numbers = NUMBERS._replace(decay=0.2)
    whole = [t.clone() for t in tensors]
    masked_adamw_(*whole, numbers, mask, backend="reference")
    monkeypatch.setattr("megasparse.kernels.masked_adamw._CHUNK", 64)
    masked_adamw_(*tensors, numbers, mask, backend="reference")
    for one, other in zip(tensors, whole, strict=True):
        assert torch.equal(one, other)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    tensors, mask = _tensors(8, 5, device), _mask(8, device)
    for place, name in enumerate(("weight", "grad", "exp_avg", "exp_avg_sq")):
        wrong = [t.half() if i == place else t for i, t in enumerate(tensors)]
        with pytest.raises(KernelError, match=f"{name} is torch.float16, expected torch.float32"):
            masked_adamw_(*wrong, NUMBERS)
    with pytest.raises(KernelError, match="mask is torch.int32, expected torch.bool"):
        masked_adamw_(*tensors, NUMBERS, mask.int())
    with pytest.raises(KernelError, match=r"mask of shape \(7,\).*expected \(8,\)"):
        masked_adamw_(*tensors, NUMBERS, mask[1:])
    with pytest.raises(KernelError, match="copy is torch.float64"):
        masked_adamw_(*tensors, NUMBERS, None, tensors[0].double())
    square = [t.view(2, 4) for t in tensors]
    with pytest.raises(KernelError, match="expected one contiguous dimension"):
        masked_adamw_(*square, NUMBERS)


def test_the_device_alone_can_know_that_nothing_is_to_be_updated(device: torch.device) -> None:
    """Gradients are infinite then."""
    tensors, mask = _tensors(1030, 3, device), _mask(1030, device)
    tensors[1].fill_(float("inf"))
    before = [tensor.clone() for tensor in tensors]
    copy = torch.full((1030,), 9.0, dtype=torch.bfloat16, device=device)
    derived = torch.tensor(NUMBERS.derived(), device=device)
    derived[APPLIES] = 0.0
    masked_adamw_(*tensors, NUMBERS, mask, copy, derived=derived, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert bool((copy == 9.0).all())
