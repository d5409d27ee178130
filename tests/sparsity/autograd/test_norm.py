"""A norm that leaves in FP8 and the linear behind it, against the two of them one by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm
from torch.utils.checkpoint import checkpoint

from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import norm_amax, transposable24_mask
from megasparse.sparsity.autograd import norm
from megasparse.sparsity.autograd.linear import NoComm, linear
from megasparse.sparsity.autograd.norm import norm_to_float8
from megasparse.sparsity.gemms.choice import GemmChooser
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gemms.packed_fp8 import PackedFp8Gemms
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice
from tests.sparsity.gemms.made import dense_fp8
from tests.transformer_engine import needs_transformer_engine

H, N, EPS = 128, 256, 1e-5


class Pair:
    """A norm and a linear, and their output by either way."""

    def __init__(self, device, fused, centred=False, packed=True, current=False):
        generator = torch.Generator().manual_seed(0)
        randn = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
        values = [1 + randn(H) / 8, randn(H) / 8, randn(N, H) / 8]
        self.device, self.fused, self.centred, self.packed = device, fused, centred, packed
        self.norm_weight, self.norm_bias, self.weight = (
            v.to(device).bfloat16().requires_grad_() for v in values
        )
        if not centred:
            self.norm_bias = None
        self.scales = CurrentScaling() if current else DelayedScaling(device, history_length=2)
        self.slots = OperandQuantizers.of(self.scales)
        self.scales.allocate()
        self.prepare()

    @property
    def parameters(self):
        return [p for p in (self.norm_weight, self.norm_bias, self.weight) if p is not None]

    def prepare(self):
        w = self.weight.detach()
        if not self.packed:
            self.gemms = dense_fp8(w, self.slots)
            return
        recipe, chooser = make_recipe("fst"), GemmChooser(None) if w.is_cuda else None
        channels = (ShardSlice(0, 0, N),)
        self.gemms = PackedFp8Gemms(recipe, channels, self.slots, chooser=chooser)
        self.gemms.refill(w, Projected(transposable24_mask(w)))

    def __call__(self, x):
        if self.fused:
            how = {"centred": self.centred, "eps": EPS}
            rows = x.reshape(-1, H)
            largest = lambda: norm_amax(rows, self.norm_weight, self.norm_bias, **how)  # noqa: E731
            y = norm_to_float8(
                x,
                self.norm_weight,
                self.norm_bias,
                **how,
                scale=self.gemms.input_scale(largest),
                trained=self.weight.requires_grad,
            )
        elif self.centred:
            y = layer_norm(x, (H,), self.norm_weight, self.norm_bias, EPS)
        else:
            y = rms_norm(x, (H,), self.norm_weight, EPS)
        return linear(y, self.weight, self.gemms, seed=3)

    def step(self, number, call=None):
        """One step: its output, all gradients, and the magnitudes that it has recorded."""
        generator = torch.Generator().manual_seed(number)
        x = (3 * torch.randn(50, 3, H, generator=generator)).to(self.device).bfloat16()
        dz = (torch.randn(50, 3, N, generator=generator) * 1e-3).to(self.device).bfloat16()
        x.requires_grad_()
        z = (call or self)(x)
        z.backward(dz)
        found = [z.detach(), x.grad, *(p.grad for p in self.parameters)]
        found.append(getattr(self.scales, "history", self.norm_weight.detach()).clone())
        for p in self.parameters:
            p.grad = None
        self.scales.finish_step()
        self.prepare()
        return found


def same(found, expected, device):
    """On the CPU bit for bit; GPU kernels add in another order, and bytes in 8 bits follow."""
    assert expected.isfinite().all() and expected.any()
    if device.type == "cpu":
        assert torch.equal(found, expected)
    else:
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert float(error) < 0.02


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("current", [True, False])
def test_the_same_results_in_every_step(device, monkeypatch, centred, packed, current):
    """With current scaling every product lacks factors, since it is computed with a factor of 1:
    those of the gradient of the norm's output are the norm's business."""
    needs_transformer_engine(device)
    kernel, calls = norm.norm_float8, []
    monkeypatch.setattr(norm, "norm_float8", lambda *a, **o: (calls.append(1), kernel(*a, **o))[1])
    rescale, late = norm.rescale_, []
    monkeypatch.setattr(norm, "rescale_", lambda *a, **o: (late.append(1), rescale(*a, **o))[1])
    ours, theirs = (Pair(device, fused, centred, packed, current) for fused in (True, False))
    for number in range(3):
        for found, expected in zip(ours.step(number), theirs.step(number), strict=True):
            same(found, expected, device)
        assert len(calls) == number + 1
    assert len(late) == (3 * (2 + centred) if current and packed else 0)


def test_the_first_gradient_is_that_of_float64(device):
    """The placeholder carries the gradient, to FP8's error."""
    needs_transformer_engine(device)
    pair = Pair(device, True, True, packed=False)
    pair.step(0)
    x = torch.randn(128, H, generator=torch.Generator().manual_seed(1)).to(device).bfloat16()
    dz = torch.randn(128, N, generator=torch.Generator().manual_seed(2)) * 1e-3
    dz = dz.to(device).bfloat16()
    x.requires_grad_()
    pair(x).backward(dz)
    leaves = [t.detach().double().requires_grad_() for t in (x, *pair.parameters)]
    y = layer_norm(leaves[0], (H,), leaves[1], leaves[2], EPS)
    (y @ leaves[3].t()).backward(dz.double())
    for found, expected in zip((x, *pair.parameters), leaves, strict=True):
        error = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert float(error) < 0.06


def test_no_gradients_are_made_of_what_is_in_8_bits(device, monkeypatch):
    needs_transformer_engine(device)
    pair, seen, backward = Pair(device, True), [], norm._Norm.backward
    pair.step(0)
    watched = staticmethod(lambda ctx, *grads: (seen.append(grads), backward(ctx, *grads))[1])
    monkeypatch.setattr(norm._Norm, "backward", watched)
    x = torch.randn(128, H, device=device).bfloat16().requires_grad_()
    pair(x).sum().backward()
    ((dy, *others),) = seen
    assert dy.shape == x.shape and others == [None, None]


def test_no_gradient_leaves_no_trace(device):
    needs_transformer_engine(device)
    pair = Pair(device, True)
    pair.step(0)
    before, x = pair.scales.history.clone(), torch.randn(7, H, device=device).bfloat16()
    expected = pair(x).detach()
    pair.scales.history.copy_(before)
    with torch.no_grad():
        z = pair(x)
    assert not z.requires_grad and torch.equal(pair.scales.history, before)
    assert torch.equal(z, expected)


@pytest.mark.parametrize("frozen", ["linear", "norm", "both"])
def test_what_is_not_trained_gets_no_gradient(device, frozen):
    needs_transformer_engine(device)
    pair = Pair(device, True)
    pair.step(0)
    pair.weight.requires_grad_(frozen == "norm")
    pair.norm_weight.requires_grad_(frozen == "linear")
    before = pair.scales.history.clone()
    for wanted in (False, True):
        x = torch.randn(7, H, device=device).bfloat16().requires_grad_(wanted)
        z = pair(x)
        if frozen == "both" and not wanted:
            assert not z.requires_grad
            continue
        z.sum().backward()
        assert (x.grad is not None) == wanted
        for p in (pair.weight, pair.norm_weight):
            assert (p.grad is not None) == p.requires_grad
            p.grad = None
    recorded = pair.scales.history[0, pair.slots.x.index] > before[0, pair.slots.x.index]
    assert bool(recorded) == (frozen == "norm")


def test_a_recomputation_repeats_the_step(device):
    needs_transformer_engine(device)
    plain, again = Pair(device, True), Pair(device, True)
    for pair in (plain, again):
        pair.step(0)  # gives the scales
    for number in (1, 2):
        recomputed = again.step(number, lambda x: checkpoint(again, x, use_reentrant=True))
        for found, expected in zip(recomputed, plain.step(number), strict=True):
            assert torch.equal(found, expected)


class Doubling(NoComm):
    """The other of two ranks has the same tokens, its second half first; what travels is there
    after the wait.

    Args:
        rank: of the two.
        own_first: this rank's tokens are multiplied before the others have come.
    """

    gathers = True

    def __init__(self, rank=0, own_first=False):
        self._rank, self._own_first = rank, own_first

    def gather(self, x_local):
        parts = [x_local, x_local.roll(len(x_local) // 2, 0)]
        whole = torch.cat(parts[:: -1 if self._rank else 1])
        result = torch.zeros_like(whole)
        return result, lambda: result.copy_(whole)

    def own_part(self, tokens):
        return self._rank * tokens if self._own_first else None

    def reduce(self, dx):
        own, other = dx.chunk(2)[:: -1 if self._rank else 1]
        return own + other.roll(len(other) // 2, 0), lambda: None


@pytest.mark.parametrize(("rank", "own_first"), [(0, False), (0, True), (1, True)])
@pytest.mark.parametrize("packed", [True, False])
def test_what_is_gathered_travels_in_8_bits(device, packed, rank, own_first):
    """The same bits as a gather of the norm's output in full, from half of the bytes."""
    needs_transformer_engine(device)
    results, sent = [], []
    for fused in (True, False):
        pair = Pair(device, fused, packed=packed)
        pair.step(0)
        x = torch.randn(128, 2, H, generator=torch.Generator().manual_seed(1)).to(device).bfloat16()
        dz = torch.randn(256, 2, N, generator=torch.Generator().manual_seed(2)) * 1e-3
        multiply, parts = pair.gemms.output_of_quantized, []
        pair.gemms.output_of_quantized = lambda row, columns, tokens, *a, m=multiply, **o: (
            parts.append((len(row), tokens)),  # noqa: B023
            m(row, columns, tokens, *a, **o),
        )[1]
        comm, scale = Doubling(rank, own_first), pair.slots.x.known_scale()
        gather = comm.gather
        comm.gather = lambda t, g=gather: (sent.append(t.dtype), g(t))[1]
        x.requires_grad_()
        if fused:
            y = norm_to_float8(
                x,
                pair.norm_weight,
                None,
                centred=False,
                eps=EPS,
                scale=scale,
                trained=True,
                gathered=True,
            )
            assert y.columns is None and not y.rows.requires_grad
        else:
            y = rms_norm(x, (H,), pair.norm_weight, EPS)
        z = linear(y, pair.weight, pair.gemms, comm, seed=3)
        assert z.shape == (256, 2, N)
        if fused:  # every token once
            assert parts == [(256, 256)] * 2 if own_first else [(512, 512)]
        z.backward(dz.to(device).bfloat16())
        results.append([z.detach(), x.grad, pair.norm_weight.grad, pair.weight.grad])
        results[-1].append(pair.scales.history[0].clone())
    assert sent == [torch.uint8] * 2 + [torch.bfloat16] * 2
    for found, expected in zip(*results, strict=True):
        same(found, expected, device)
