"""The three GEMMs and their autograd function, against plain formulas in float64."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import is_24, mvue24, prune24_mask
from megasparse.sparsity.autograd.linear import linear
from megasparse.sparsity.gemms.dense import DenseGemms, ReferenceSparseGemms
from megasparse.sparsity.gemms.simulated_fp8 import SimulatedFp8Gemms
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.shard import ShardSlice, TokenShare
from tests.sparsity.gemms.made import drawing, filled, reference_sparse, simulated_fp8


def _operands(t=12, k=8, n=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, t // 3, k, generator=generator, requires_grad=True)
    w = torch.randn(n, k, generator=generator, requires_grad=True)
    dz = torch.randn(3, t // 3, n, generator=generator)
    return x, w, dz


def test_dense_equals_torch_linear():
    x, w, dz = _operands()
    z = linear(x, w, DenseGemms(w))
    z.backward(dz)
    x64, w64 = (a.detach().double().requires_grad_() for a in (x, w))
    z64 = torch.nn.functional.linear(x64, w64)
    z64.backward(dz.double())
    torch.testing.assert_close(z.double(), z64, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)


def test_a_bias_and_its_gradient():
    x, w, dz = _operands()
    bias = torch.randn(16, requires_grad=True)
    z = linear(x, w, DenseGemms(w), bias=bias)
    z.backward(dz)
    assert torch.equal(z, linear(x, w, DenseGemms(w)) + bias)
    torch.testing.assert_close(bias.grad, dz.sum((0, 1)))
    again = x.detach().requires_grad_()
    linear(again, w, DenseGemms(w)).backward(dz)
    assert torch.equal(x.grad, again.grad)


def test_sparse_uses_the_pruned_weight_forward_and_backward_and_passes_gradients_through():
    x, w, dz = _operands()
    pruned = torch.where(prune24_mask(w.detach()), w.detach(), torch.zeros(()))
    gemms = reference_sparse(pruned, "off", (ShardSlice(0, 0, 16),))
    z = linear(x, w, gemms)
    z.backward(dz)
    torch.testing.assert_close(z, x.detach() @ pruned.t())
    torch.testing.assert_close(x.grad, dz @ pruned)
    # Straight through: masked weights get their gradient too.
    torch.testing.assert_close(w.grad, dz.reshape(12, 16).t() @ x.detach().reshape(12, 8))


def test_weight_gradient_uses_mvue_of_the_output_gradient_along_tokens():
    x, w, dz = _operands()
    channels = (
        ShardSlice(0, 0, 8),
        ShardSlice(8, 40, 8),
    )  # as a shard of fused gate and up would be
    gemms = reference_sparse(w.detach(), "exact", channels)
    linear(x, w, gemms, seed=5).backward(dz)
    flat = dz.reshape(12, 16)
    pruned = torch.cat(
        [
            mvue24(flat[:, :8], seed=5, dim=0, offsets=(0, 0)),
            mvue24(flat[:, 8:], seed=5, dim=0, offsets=(0, 40)),
        ],
        1,
    )
    assert is_24(pruned, dim=0) and not torch.equal(pruned, flat)
    torch.testing.assert_close(w.grad, pruned.t() @ x.detach().reshape(12, 8))
    # The input gradient uses the whole output gradient.
    torch.testing.assert_close(x.grad, dz @ w.detach())


def test_without_a_seed_it_is_zero():
    x, w, dz = _operands()
    found = []
    for more in ({}, {"seed": 0}, {"seed": lambda: 0}):
        w.grad = None
        gemms = reference_sparse(w.detach(), "exact", (ShardSlice(0, 0, 16),))
        linear(x, w, gemms, **more).backward(dz)
        found.append(w.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_column_shards_draw_the_numbers_of_the_whole():
    _, w, dz = _operands()
    flat = dz.reshape(12, 16)

    def grad_weight(sections, dz):
        gemms = reference_sparse(w, "exact", sections)
        return gemms.grad_weight(gemms.prepare_grad_output(dz, 3), (torch.eye(12),))

    whole = grad_weight((ShardSlice(0, 0, 16),), flat)
    parts = [
        grad_weight((ShardSlice(0, 8 * r, 8),), flat[:, 8 * r : 8 * r + 8].contiguous())
        for r in range(2)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("asked", [False, True])
def test_ranks_with_some_of_the_tokens_draw_the_numbers_of_the_whole(asked):
    """Of context parallelism: each has the chunk that mirrors its first one, too."""
    _, w, _ = _operands()
    dz = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    parts = (ShardSlice(0, 40, 4), ShardSlice(4, 80, 12))
    whole = torch.cat(
        [
            mvue24(dz[:, :4], seed=5, dim=0, offsets=(0, 40)),
            mvue24(dz[:, 4:], seed=5, dim=0, offsets=(0, 80)),
        ],
        1,
    )
    for rank in range(2):
        tokens = torch.arange(32).view(4, 8)[[rank, 3 - rank]].flatten()
        probe = Probe()
        if asked:
            probe.ask()
        gemms = ReferenceSparseGemms(drawing("exact"), parts, probe, TokenShare(rank, 2))
        filled(gemms, w)
        own, x = dz[tokens], torch.eye(16)
        found = gemms.grad_weight(gemms.prepare_grad_output(own, 5), (x,)).t()
        assert torch.equal(found, whole[tokens])
        assert ("mvue_after" in probe.sums) == asked
        if asked:
            after = float(whole[tokens].double().square().sum())
            assert float(probe.sums["mvue_after"]) == pytest.approx(after, rel=1e-6)


def test_frozen_input_or_weight_costs_no_gradient():
    x, w, dz = _operands()
    linear(x.detach(), w, DenseGemms(w)).backward(dz)
    assert w.grad is not None
    z = linear(x, w.detach(), DenseGemms(w))
    z.backward(dz)
    assert x.grad is not None


def _rounded(x, dtype):
    """`q / s` for `q = cast(x s)` and s the largest value of the format over that of x."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).float() / scale


@pytest.mark.parametrize(
    ("dtype", "most", "step"),
    [(torch.float8_e4m3fn, 448, 2**-4), (torch.float8_e5m2, 57344, 2**-3)],
)
def test_fp8_rounding_is_to_the_nearest_under_one_scale(dtype, most, step):
    def rounding(reduce_max=None):
        return SimulatedFp8Gemms(drawing("off"), (), reduce_max)._round

    x = torch.randn(64, 64)
    rounded = rounding()(x, dtype, None)
    scale = most / float(x.abs().max())
    big = x.abs() * scale > 2**-5  # normal numbers: relative error at most half a step
    assert ((rounded - x).abs() <= step * x.abs() * (1 + 1e-6))[big].all()
    assert (rounded != x).any() and float(rounded.abs().max()) == pytest.approx(
        float(x.abs().max())
    )
    small = x * 1e-4  # below 1, and scaled all the same
    torch.testing.assert_close(rounding()(small, dtype, None), _rounded(small, dtype))
    zeros = torch.zeros(4, 4)
    assert torch.equal(rounding()(zeros, dtype, None), zeros)
    # A shard with the amax of the whole is rounded as the whole is.
    part = rounding(lambda _: (x.abs().max() * 0.01).float())(x[:32] * 0.01, dtype, None)
    whole = rounding()(torch.cat([x[:32] * 0.01, x * 0.01]), dtype, None)
    assert torch.equal(part, whole[:32])


def test_simulated_fp8_tells_the_probe():
    x, w, dz = (a.detach() for a in _operands())
    gemms = simulated_fp8(w, "exact", (ShardSlice(0, 0, 16),))
    gemms.output(x.reshape(12, 8))
    assert not gemms._probe.sums  # nobody asked
    gemms._probe.ask()
    operands = gemms.prepare_grad_output(dz.reshape(12, 16), 3)
    gemms.output(x.reshape(12, 8))
    gemms.grad_input(operands)
    gemms.grad_weight(operands, (x.reshape(12, 8),))
    found = {name: float(value) for name, value in gemms._probe.sums.items()}
    sizes = {"x": x, "weight": w, "grad_output": dz, "grad_output_mvue": dz}
    for name, tensor in sizes.items():
        assert found[f"fp8_{name}_all"] == tensor.numel()
        assert found[f"fp8_{name}_largest"] >= 1
        if name != "grad_output_mvue":
            assert float(gemms._probe.maxima[name]) == float(tensor.abs().max())
    assert set(gemms._probe.maxima) == set(sizes)


def test_simulated_fp8_takes_the_papers_formats():
    x, w, dz = (a.detach() for a in _operands())
    pruned = torch.where(prune24_mask(w), w, torch.zeros(()))
    gemms = simulated_fp8(pruned, "exact", (ShardSlice(0, 0, 16),))
    x2, dz2 = x.reshape(12, 8), dz.reshape(12, 16)
    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    w4, w5 = _rounded(pruned, e4), _rounded(pruned, e5)
    assert is_24(w4) and is_24(w5)
    torch.testing.assert_close(gemms.output(x2), _rounded(x2, e4) @ w4.t())
    torch.testing.assert_close(
        gemms.grad_input(gemms.prepare_grad_output(dz2, 3)), _rounded(dz2, e5) @ w5
    )
    kept = mvue24(dz2, seed=3, dim=0)  # amplified entries: the scale is taken after MVUE
    expected = _rounded(kept, e5).t() @ _rounded(x2, e5)
    torch.testing.assert_close(
        gemms.grad_weight(gemms.prepare_grad_output(dz2, 3), (x2,)), expected
    )


def test_communication_travels_beside_the_gemms_and_is_awaited():
    events = []

    class Comm:
        gathers = True

        def gather(self, x_local):
            return self._later("gather", torch.cat([x_local, x_local]))

        def own_part(self, tokens):
            return None

        def reduce(self, dx):
            return self._later("reduce", dx[: len(dx) // 2] + dx[len(dx) // 2 :])

        def _later(self, name, value):
            events.append(name)
            result = torch.full_like(value, float("nan"))
            return result, lambda: (events.append(f"{name} ends"), result.copy_(value))

    class Logged(DenseGemms):
        def grad_input(self, gradient, deferred=None):
            events.append("dX")
            return super().grad_input(gradient, deferred)

        def grad_weight(self, gradient, kept):
            events.append("dW")
            return super().grad_weight(gradient, kept)

    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    z = linear(x, w, Logged(w), Comm())
    assert events == ["gather", "gather ends"]
    events.clear()
    z.sum().backward()
    assert events == ["gather", "dX", "reduce", "gather ends", "dW", "reduce ends"]
    torch.testing.assert_close(x.grad, 2 * w.sum(0).expand(3, 8))
    torch.testing.assert_close(w.grad, 2 * x.sum(0).expand(4, 8))
