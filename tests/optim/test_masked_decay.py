"""The decay of a step per piece: in the gradient that is clipped with it, and for the probes."""

from __future__ import annotations

import pytest
import torch

from megasparse.optim.fragments import Fragment
from megasparse.optim.masked_decay import MaskedDecay
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.own_decay import OwnDecay
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight

LAMBDA = 0.25


def made(recipe="fst", count=2, steps=100, **settings):
    """A controller, its masked weights, and a decay that knows them whole."""
    torch.manual_seed(0)
    made = make_recipe(recipe, **{"masked_decay": LAMBDA, **settings})
    controller, weights = SparsityController(made, Clock(0, steps)), []
    for number in range(count):
        state = SparseWeight(f"w{number}", made, WeightShard((8, 12)))
        weight = torch.nn.Parameter(torch.randn(8, 12))
        controller.register(state, weight, number)
        state.gemms(weight, 0, True, True)
        weight.grad = torch.randn(8, 12)
        weights.append(weight)
    decay = MaskedDecay(controller)
    decay.attach([Fragment(f"w{n}", w, w, 0, 0, w.numel()) for n, w in enumerate(weights)])
    return controller, weights, decay


def masked(controller, number):
    state, weight = controller.weights[number]
    return weight.detach() * ~state.mask


@pytest.mark.parametrize("strength", [LAMBDA, 1.0])
def test_a_gradient_that_is_clipped_with_its_decay(strength):
    how = {"masked_decay_before_clipping": True, "masked_decay": strength}
    controller, weights, decay = made(sparsity_phases="fst:1/2,dense:1/2", **how)
    before = weights[1].grad.clone()
    found = decay.with_decay(weights[1], weights[1].grad)
    expected = (before + strength * masked(controller, 1)).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(weights[1].grad, before)
    bias = torch.nn.Parameter(torch.ones(3))  # without a mask
    assert decay.with_decay(bias, before) is before
    controller.clock.step = 50  # dense
    assert decay.with_decay(weights[1], before) is before
    _, weights, apart = made()  # clipped alone
    assert apart.with_decay(weights[0], before) is before
    _, weights, none = made(masked_decay_before_clipping=True, masked_decay=0.0)
    assert none.with_decay(weights[0], before) is before


def test_a_piece_of_a_gradient_has_the_decay_of_its_piece():
    """In 16 bits, from a flat tensor, and with padding behind it."""
    controller, weights, decay = made(masked_decay_before_clipping=True)
    flat = torch.cat([torch.zeros(5), weights[1].detach().flatten()[10:30]])
    decay.attach([Fragment("w1", weights[1], flat, 5, 10, 20)])
    gradient = torch.randn(24).bfloat16()
    found = decay.with_decay(weights[1], gradient)
    assert found.dtype == torch.float32
    expected = gradient.float()
    expected[:20] += LAMBDA * masked(controller, 1).flatten()[10:30]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("own", [False, True])
def test_probes_are_told_how_strong_it_is(own):
    controller, weights, decay = made()
    extra = torch.nn.Parameter(torch.ones(4))
    extra.grad = torch.ones(4)
    controller.ask(True)
    for number, (state, _) in enumerate(controller.weights):
        if own:
            state.decay = OwnDecay(torch.device("cpu"))
            state.decay.value.fill_(number + 2.0)
    optimizer = torch.optim.SGD([*weights, extra])
    decay.measure(optimizer, 0.0)
    assert not any(state.probe.sums for state, _ in controller.weights)
    decay.measure(optimizer, 0.5)
    for number, (state, weight) in enumerate(controller.weights):
        strength = 0.5 * (number + 2.0 if own else 1.0)
        expected = {
            "gradient": float(weight.grad.double().square().sum()),
            "decay": strength**2 * float(masked(controller, number).double().square().sum()),
        }
        found = {name: float(value) for name, value in state.probe.sums.items()}
        assert found == pytest.approx(expected, rel=1e-5)


def test_what_has_no_gradient_or_no_mask_is_not_measured():
    controller, weights, decay = made(count=3)
    controller.ask(True)
    weights[0].grad = None
    controller.weights[1][0].mask = None
    decay.measure(torch.optim.SGD(weights), 1.0)
    assert [bool(state.probe.sums) for state, _ in controller.weights] == [False, False, True]


def test_the_decay_of_cast_is_of_signs():
    controller, weights, decay = made("cast", count=1)
    controller.weights[0][0].keep_mask(weights[0], 0)
    controller.ask(True)
    decay.measure(torch.optim.SGD(weights), 0.5)
    found = float(controller.weights[0][0].probe.sums["decay"])
    assert found == pytest.approx(0.25 * 48)


def test_pieces_of_what_nobody_prunes():
    controller, weights, decay = made(count=1)
    controller.weights[0][0].decay = OwnDecay(torch.device("cpu"))
    whole = decay.pieces(weights[0])
    assert [(p.start, p.length) for p in whole] == [(0, 96)]
    assert whole[0].decay is controller.weights[0][0].decay.value
    flat = torch.zeros(60)
    decay.attach([Fragment("w", weights[0], flat, at, at, 10) for at in (5, 30)])
    assert [(p.start, p.length, p.mask is None) for p in decay.pieces(flat)] == [
        (0, 5, True),
        (5, 10, False),
        (15, 15, True),
        (30, 10, False),
        (40, 20, True),
    ]
    stranger = torch.nn.Parameter(torch.ones(2, 3))
    decay.attach([Fragment("s", stranger, stranger, 0, 0, 6)])
    assert decay.pieces(stranger) == [(0, 6, None, None)] and decay.fragments_of(weights[0]) == []
