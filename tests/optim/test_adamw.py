"""AdamW with masked decay against the papers' update rules written out in float64."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels import AdamW
from megasparse.optim import adamw as module
from megasparse.optim.adamw import MaskedAdamW, _with_decay, parameter_groups
from megasparse.optim.fragments import Fragment
from megasparse.optim.masked_decay import MaskedDecay, Piece
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


def test_a_step_that_does_not_apply_changes_nothing_and_can_be_retracted():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = MaskedAdamW([weight], before_step=lambda _: True, lr=0.1)
    weight.grad = torch.ones(4)
    optimizer.applies = torch.tensor(False)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4))
    optimizer.retract()
    assert weight not in optimizer.state  # as if the step had never been
    optimizer.applies = torch.tensor(True)
    for _ in range(2):
        optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 2 and (weight < 1).all()
    before, moment = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    optimizer.applies.fill_(False)
    optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 3
    optimizer.retract()
    assert int(optimizer.state[weight]["step"]) == 2 and torch.equal(weight.detach(), before)
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment)
    optimizer.applies = None
    optimizer.run = lambda update: None  # somebody else runs it
    optimizer.step()
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("kept", [None, 0.25])
def test_cast_decays_by_signs_and_keeps_of_the_momentum_what_is_said(kept):
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0, -1.0]))
    mask = torch.tensor([True, True, False, False])
    optimizer = MaskedAdamW(
        [weight],
        lambda _: True,
        lambda _: [Piece(0, 4, mask)],
        True,
        True,
        lr=0.1,
        betas=BETAS,
        weight_decay=0.0,
    )
    assert optimizer.decoupled
    optimizer.decay = 0.5
    if kept is not None:
        optimizer.kept = kept
    weight.grad = torch.tensor([1.0, -1.0, 4.0, 4.0])
    before = weight.detach().clone()
    optimizer.step()
    m = (1 - BETAS[0]) * weight.grad
    u = torch.where(mask, m, (1.0 if kept is None else kept) * m + 0.5 * before.sign())
    v = (1 - BETAS[1]) * u * u
    step = (u / (1 - BETAS[0])) / ((v / (1 - BETAS[1])).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), before - 0.1 * step)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], v)


def test_a_decay_of_its_own_is_in_units_of_the_optimizers():
    """On the host, or on the device beside numbers that stay those of the other pieces."""
    numbers, own = AdamW(1, 0.1, 0.9, 0.99, 1e-8, 0.0, decay=0.5), torch.tensor(3.0)
    derived = torch.tensor(numbers.derived())
    assert _with_decay(numbers, derived, None) == (numbers, derived)
    assert _with_decay(numbers, None, own) == (numbers._replace(decay=1.5), None)
    same, found = _with_decay(numbers, derived, own)
    expected = torch.tensor(numbers._replace(decay=1.5).derived())
    assert same is numbers and torch.equal(found, expected)
    assert torch.equal(derived, torch.tensor(numbers.derived()))


def test_groups_of_experts_of_ends_and_of_scales():
    def parameter(*shape, experts=False):
        made = torch.nn.Parameter(torch.zeros(shape))
        if experts:
            made.allreduce = False
        return made

    named = {
        "experts.fc1": parameter(2, 2, experts=True),
        "experts.fc2": parameter(2, 2, experts=True),
        "embedding": parameter(4, 2),
        "output": parameter(4, 2),
        "fc.weight_scale": parameter(2, 2),
        "fc.weight": parameter(2, 2),
        "router": parameter(2, 2),
        "norm": parameter(2),
    }
    masked = {id(named["experts.fc2"]), id(named["fc.weight"])}
    groups = parameter_groups(named.items(), masked, 0.1, ends=("output", "norm2"))
    found = {
        group["name"]: (
            [name for p in group["params"] for name, one in named.items() if one is p],
            group["weight_decay"],
            group.get("moe"),
        )
        for group in groups
    }
    assert found == {
        "masked": (["fc.weight"], 0.1, None),
        "matrices": (["embedding", "router"], 0.1, None),
        "vectors": (["fc.weight_scale", "norm"], 0.0, None),
        "ends": (["output"], 0.1, None),
        "experts": (["experts.fc1"], 0.1, True),
        "masked experts": (["experts.fc2"], 0.1, True),
    }


def test_groups_split_masked_matrices_and_vectors():
    linear, norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
    named = [*linear.named_parameters(), *norm.named_parameters()]
    groups = {g["name"]: g for g in parameter_groups(named, {id(linear.weight)}, 0.1)}
    assert groups["masked"]["params"] == [linear.weight]
    assert groups["masked"]["weight_decay"] == 0.1 and groups["vectors"]["weight_decay"] == 0.0
    assert len(groups["vectors"]["params"]) == 3 and "matrices" not in groups


@pytest.mark.parametrize("pieces", [None, lambda _: [Piece(0, 64, torch.arange(64) < 32)]])
def test_without_more_it_is_adamw(pieces):
    """Bit for bit: nobody has to set a clipping factor or a decay, masks or not."""
    torch.manual_seed(3)
    ours, theirs = (torch.nn.Parameter(torch.zeros(64)) for _ in "ab")
    options = {"lr": LR, "betas": BETAS, "eps": 0.1}  # an eps that a factor would not cancel in
    groups = [{"params": [ours], "weight_decay": WD, "name": "matrices"}]
    optimizer = MaskedAdamW(groups, before_step=lambda _: True, pieces=pieces, **options)
    reference = torch.optim.AdamW([theirs], weight_decay=WD, **options)
    for _ in range(3):
        ours.grad = torch.randn(64)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_the_numbers_of_a_step_keep_their_place_while_their_number_stays(monkeypatch):
    """Kernels of a captured update read them there; numbers of the device replace the host's."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = MaskedAdamW([weight], lambda _: True)
    optimizer._now = [(weight, None)]  # type: ignore[list-item]
    rows = [[float(10 * row + column) for column in range(10)] for row in range(3)]
    optimizer._send(rows)
    first = optimizer._derived
    assert first is not None and first.tolist() == rows and first.device == weight.device
    optimizer._send([[v + 1 for v in row] for row in rows])
    assert optimizer._derived is first and first[2, 3] == 24
    optimizer.clip, optimizer.decay = torch.tensor(0.5), torch.tensor(0.25)
    optimizer.applies = torch.tensor(True)
    optimizer._send(rows)
    expected = torch.tensor(rows)
    for column, value in ((module.CLIP, 0.5), (module.DECAY, 0.25), (module.APPLIES, 1.0)):
        expected[:, column] = value
    assert optimizer._derived is first and torch.equal(first, expected)
    optimizer._send(rows[:2])
    assert optimizer._derived is not first and optimizer._derived.shape == (2, 10)
