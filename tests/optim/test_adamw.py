"""AdamW with masked decay against the papers' update rules written out in float64."""

from __future__ import annotations

import pytest
import torch

from megasparse.optim.adamw import MaskedAdamW, parameter_groups
from megasparse.optim.fragments import Fragment
from megasparse.optim.masked_decay import MaskedDecay
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight

LR, WD, EPS, BETAS, LAMBDA, CLIP = 0.01, 0.1, 1e-8, (0.9, 0.95), 0.05, 0.5


def _controller(recipe, weight):
    controller = SparsityController(recipe, Clock(0, 100))
    state = SparseWeight("w", recipe, WeightShard(tuple(weight.shape)))
    controller.register(state, weight, 0)
    state.gemms(weight, 0, True, True)
    return controller, state.mask


def _on_gradient(w, g, mask, m, v, t):
    g = g + LAMBDA * (~mask) * w  # FST eq. 1.4, then AdamW
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    w = w * (1 - LR * WD)
    step = (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    return w - LR * step, m, v


def _decoupled(w, g, mask, m, v, t):
    m = BETAS[0] * m + (1 - BETAS[0]) * g  # AST section 3.2
    u = m + LAMBDA * (~mask) * w
    v = BETAS[1] * v + (1 - BETAS[1]) * u * u
    w = w * (1 - LR * WD)
    return w - LR / (1 - BETAS[0] ** t) * u / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS), m, v


@pytest.mark.parametrize(("name", "rule"), [("fst", _on_gradient), ("ast", _decoupled)])
def test_update_rule(name, rule):
    recipe = make_recipe(name, masked_decay=LAMBDA, masked_decay_ramp_iters=0)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 12))
    bias = torch.nn.Parameter(torch.randn(8))
    controller, mask = _controller(recipe, weight)
    decay = MaskedDecay(controller)
    decay.attach([Fragment("w", weight, weight, 0, 0, weight.numel())])

    optimizer = MaskedAdamW(
        parameter_groups([("w", weight), ("b", bias)], {id(weight)}, WD),
        before_step=lambda _: True,
        pieces=decay.pieces,
        decoupled=name == "ast",
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    optimizer.decay, optimizer.clip = LAMBDA, CLIP
    copy = torch.zeros(96, dtype=torch.bfloat16)
    optimizer.copies[id(weight)] = copy
    w, m, v = weight.detach().double(), torch.zeros(8, 12).double(), torch.zeros(8, 12).double()
    bias_before = bias.detach().clone()
    plain = torch.nn.Parameter(bias.detach().clone())  # torch's AdamW is the same to the last bit
    reference = torch.optim.AdamW([plain], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    for t in range(1, 5):
        g = torch.randn(8, 12)
        weight.grad, bias.grad = g.clone(), torch.full((8,), float(t))
        plain.grad = bias.grad * CLIP
        w, m, v = rule(w, CLIP * g.double(), mask, m, v, t)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-6)
        assert torch.equal(weight.grad, g)
        assert torch.equal(copy, weight.detach().flatten().bfloat16())
    assert torch.equal(bias, plain) and not torch.equal(bias, bias_before)


def test_decay_finds_its_place_in_a_flat_shard():
    """ZeRO's view: one flat tensor holds the end of one weight and the start of another."""
    recipe = make_recipe("fst", masked_decay=LAMBDA)
    a, b = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    controller, mask_a = _controller(recipe, a)
    state_b = SparseWeight("b", recipe, WeightShard((8, 8)))
    controller.register(state_b, b, 1)
    state_b.gemms(b, 0, True, True)
    flat = torch.cat([torch.randn(3), a.detach().flatten()[40:], b.detach().flatten()[:50]])
    decay = MaskedDecay(controller)
    decay.attach([Fragment("b", b, flat, 27, 0, 50), Fragment("a", a, flat, 3, 40, 24)])
    pieces = decay.pieces(flat)
    assert [(p.start, p.length) for p in pieces] == [(0, 3), (3, 24), (27, 50)]
    assert pieces[0].mask is None
    assert torch.equal(pieces[1].mask, mask_a.flatten()[40:])
    assert torch.equal(pieces[2].mask, state_b.mask.flatten()[:50])
    decay.attach([Fragment("b", b, flat, 2, 0, 50)])  # a tail without an owner: padding
    assert [(p.start, p.length) for p in decay.pieces(flat)] == [(0, 2), (2, 50), (52, 25)]
    assert decay.pieces(torch.zeros(3)) == [(0, 3, None, None)]


@pytest.mark.parametrize("name", ["fst", "ast"])
def test_a_mask_that_only_measures_flips_decays_nothing(name):
    recipe = make_recipe(name, masked_decay=LAMBDA, dense_tail_fraction=0.5)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    controller, mask = _controller(recipe, weight)
    decay = MaskedDecay(controller)
    decay.attach([Fragment("w", weight, weight, 0, 0, weight.numel())])
    assert mask is not None and decay.pieces(weight)[0].mask is not None
    controller.clock.step = 60
    assert decay.pieces(weight) == [(0, 64, None, None)]


def test_before_step_can_hold_everything_back():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = MaskedAdamW([weight], before_step=lambda _: False, lr=1.0)
    weight.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4)) and not optimizer.state


def test_groups_split_masked_matrices_and_vectors():
    linear, norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
    named = [*linear.named_parameters(), *norm.named_parameters()]
    groups = {g["name"]: g for g in parameter_groups(named, {id(linear.weight)}, 0.1)}
    assert groups["masked"]["params"] == [linear.weight]
    assert groups["masked"]["weight_decay"] == 0.1 and groups["vectors"]["weight_decay"] == 0.0
    assert len(groups["vectors"]["params"]) == 3 and "matrices" not in groups


def test_without_more_it_is_adamw():
    """Bit for bit: nobody has to set a clipping factor or a decay."""
    torch.manual_seed(3)
    ours, theirs = (torch.nn.Parameter(torch.zeros(64)) for _ in "ab")
    options = {"lr": LR, "betas": BETAS, "eps": 0.1}  # an eps that a factor would not cancel in
    groups = [{"params": [ours], "weight_decay": WD, "name": "matrices"}]
    optimizer = MaskedAdamW(groups, before_step=lambda _: True, **options)
    reference = torch.optim.AdamW([theirs], weight_decay=WD, **options)
    for _ in range(3):
        ours.grad = torch.randn(64)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
