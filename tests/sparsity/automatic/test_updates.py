"""What hooks around an optimizer's step do to gradients and weights, call by call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.sparsity.automatic.run import Run
from megasparse.sparsity.automatic.updates import Target, Updates
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight

LR, BETAS, EPS, WD, LAMBDA = 0.02, (0.8, 0.95), 1e-6, 0.1, 0.5


def layer_of(recipe):
    """A pruned layer with a gradient."""
    state = SparseWeight("w", recipe, WeightShard((4, 8)))
    weight = torch.nn.Parameter(torch.randn(4, 8))
    weight.grad = torch.randn(4, 8)
    state.gemms(weight, 0, True, True)
    return SimpleNamespace(weight=weight, state=state)


def made(name, count=1, strength=LAMBDA):
    """Updates of some layers, the layers, and an optimizer that holds them and a bias."""
    torch.manual_seed(0)
    ramp = {"masked_decay_ramp_iters": 0} if name == "ast" else {}
    run = Run(make_recipe(name, masked_decay=strength, **ramp), Clock(0, 100))
    layers = {f"layer {n}": layer_of(run.recipe) for n in range(count)}
    layers["dense"] = SimpleNamespace(weight=torch.nn.Parameter(torch.ones(4, 8)), state=None)

    def locate(name, layer, held):
        return Target(layer.weight, lambda mask: mask) if id(layer.weight) in held else None

    tensors = [layer.weight for layer in layers.values()]
    optimizer = torch.optim.AdamW(tensors, lr=LR, betas=BETAS, eps=EPS, weight_decay=WD)
    return Updates(run, layers, locate), run, layers, optimizer


@pytest.mark.parametrize("scale", [None, 4.0])
def test_a_decay_in_the_momentum_is_the_rule_of_ast(scale):
    """In float64, with gradients that a GradScaler has left scaled."""
    updates, run, layers, _ = made("ast", count=2)
    one, dense = layers["layer 1"].weight, layers["dense"].weight
    other = {"params": [layers["layer 0"].weight], "lr": 9.0, "weight_decay": 0.0}
    groups = [other, {"params": [dense, one]}, {**other, "params": [torch.nn.Parameter(one.data)]}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=WD)
    dense.grad = torch.ones(4, 8)
    layers["layer 0"].weight.grad = None
    if scale:
        optimizer.grad_scale = torch.tensor(scale)
    w, m, v = one.detach().double(), 0.0, 0.0
    masked = ~layers["layer 1"].state.mask
    for t in range(1, 4):
        one.grad = gradient = torch.randn(4, 8)
        updates.before(optimizer, (optimizer,), {})
        assert one.grad is None and dense.grad is not None  # torch updates what is not masked
        updates.after(optimizer)
        assert one.grad is gradient and run.stepped
        g = gradient.double() / (scale or 1.0)
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        u = m + LAMBDA * masked * w
        v = BETAS[1] * v + (1 - BETAS[1]) * u * u
        root = (v / (1 - BETAS[1] ** t)).sqrt() + EPS
        w = w * (1 - LR * WD) - LR / (1 - BETAS[0] ** t) * u / root
        torch.testing.assert_close(one.detach().double(), w, rtol=1e-5, atol=1e-6)
        run.stepped = False
    assert layers["layer 0"].weight not in optimizer.state and dense not in optimizer.state


def test_a_step_that_a_scaler_skips_changes_nothing():
    for name in ("ast", "fst"):
        updates, run, layers, optimizer = made(name)
        weight = layers["layer 0"].weight
        before, gradient = weight.detach().clone(), weight.grad
        optimizer.found_inf = torch.ones(1)
        updates.before(optimizer, (optimizer,), {})
        updates.after(optimizer)
        assert torch.equal(weight, before) and weight.grad is gradient and not run.stepped
        optimizer.found_inf = torch.zeros(1)
        once = gradient.clone()
        updates.before(optimizer, (optimizer,), {})
        if name == "fst":  # the gradients of the step's next try are decayed too
            masked = ~layers["layer 0"].state.mask
            torch.testing.assert_close(weight.grad, once + LAMBDA * masked * before)
        updates.after(optimizer)
        assert run.stepped


@pytest.mark.parametrize("strength", [LAMBDA, 1.0])
def test_gradients_are_decayed_once_a_step(strength):
    updates, run, layers, optimizer = made("fst", count=2, strength=strength)
    optimizer.grad_scale = torch.tensor(8.0)
    weight = layers["layer 1"].weight
    first, decay = weight.grad.clone(), strength * weight.detach() * ~layers["layer 1"].state.mask
    for _ in range(2):
        assert updates.before(optimizer, (optimizer,), {}) is None
        torch.testing.assert_close(weight.grad, first + 8 * decay)
    run.clock.step = 1
    updates.before(optimizer, (optimizer,), {})
    torch.testing.assert_close(weight.grad, first + 16 * decay)


def test_by_hand_is_for_a_step_that_no_hook_has_seen():
    for name, stepped, strength in (
        ("fst", False, LAMBDA),
        ("fst", True, LAMBDA),
        ("fst", False, 0.0),
        ("ast", False, LAMBDA),
    ):
        updates, run, layers, _ = made(name, strength=strength)
        run.stepped, weight = stepped, layers["layer 0"].weight
        expected = weight.grad.clone()
        if (name, stepped) == ("fst", False):
            expected += strength * weight.detach() * ~layers["layer 0"].state.mask
        updates.by_hand()
        torch.testing.assert_close(weight.grad, expected)


def test_a_closure_is_followed_by_the_decay_and_other_arguments_stay():
    updates, _, layers, optimizer = made("fst")
    weight, called = layers["layer 0"].weight, []

    def closure():
        assert torch.is_grad_enabled()
        weight.grad = torch.zeros(4, 8)
        called.append(1)
        return 7.0

    decay = LAMBDA * weight.detach() * ~layers["layer 0"].state.mask
    args, kwargs = updates.before(optimizer, (optimizer, closure, "more"), {"other": 1})
    assert args[0] is optimizer and args[2:] == ("more",) and kwargs == {"other": 1}
    named = updates.before(optimizer, (optimizer,), {"closure": closure, "other": 1})
    assert named[0] == (optimizer,) and named[1]["other"] == 1
    for one in (args[1], args[1], named[1]["closure"]):  # gradients are new at each call
        assert one() == 7.0
        torch.testing.assert_close(weight.grad, decay)
    assert len(called) == 3


def test_what_the_rule_of_ast_cannot_update_is_refused():
    updates, _, layers, optimizer = made("ast")
    for odd, words in (
        (torch.optim.SGD([layers["layer 0"].weight]), "the optimizer is SGD; expected"),
        (torch.optim.AdamW([layers["layer 0"].weight], amsgrad=True), "AdamW with amsgrad;"),
    ):
        with pytest.raises(ConfigError, match=words):
            updates.before(odd, (odd,), {})
    with pytest.raises(ConfigError, match="computes gradients inside the step"):
        updates.before(optimizer, (optimizer, lambda: 0.0), {})
    layers["layer 0"].weight.data = layers["layer 0"].weight.data.bfloat16()
    layers["layer 0"].weight.grad = torch.ones(4, 8).bfloat16()
    with pytest.raises(ConfigError, match=r"layer 0: recipe ast with torch.bfloat16 weights"):
        updates.before(optimizer, (optimizer,), {})
    without, _, layers, _ = made("ast", strength=0.0)
    sgd = torch.optim.SGD([layers["layer 0"].weight])
    assert without.before(sgd, (sgd,), {}) is None  # as the refusal says


def test_other_optimizers_are_left_alone():
    updates, run, _, _ = made("fst")
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    assert updates.before(other, (other,), {}) is None
    updates.after(other)
    assert not run.stepped
