"""A decay that follows second moments: against its formula in float64, whole and in pieces."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.kernels import transposable24_mask
from megasparse.optim.adamw import MaskedAdamW
from megasparse.optim.decay_rule import DecayRule
from megasparse.optim.fragments import Fragment
from megasparse.optim.masked_decay import MaskedDecay
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.own_decay import OwnDecay
from megasparse.sparsity.recipe import make_recipe, recipe_with
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from tests import dist
from tests.parallel.layouts import BASE, GPT, SHALLOW, TP2, zero
from tests.parallel.trace import traced

RHO, B2, EVERY = 0.05, 0.95, 10
RECIPE = make_recipe("fst", masked_decay_rho=RHO, masked_decay_update_interval=EVERY)


def controller_of(weights):
    controller = SparsityController(RECIPE, Clock(0, 1000))
    for number, weight in enumerate(weights):
        state = SparseWeight(f"w{number}", RECIPE, WeightShard(tuple(weight.shape)))
        controller.register(state, weight, number)
        state.gemms(weight, 0, True, True)
    return controller


def wanted(weight, v, t):
    """rho mean sqrt(v) / mean |w| over masked entries, in float64."""
    masked = ~transposable24_mask(weight.detach())
    root = (v.double() / (1 - B2**t)).sqrt()
    return float(RHO * root[masked].mean() / weight.detach().double().abs()[masked].mean())


def optimizer_of(tensors, moments, t):
    optimizer = torch.optim.AdamW(tensors, betas=(0.9, B2))
    for tensor, v in zip(tensors, moments, strict=True):
        optimizer.state[tensor] = {"step": torch.tensor(float(t)), "exp_avg_sq": v}
    return optimizer


def follow(controller, rule, step):
    controller.clock.step = step
    rule.follow()
    return [float(state.decay.value) for state, _ in controller.weights]


def test_it_follows_the_moments_at_most_twice_as_strong_at_each_refresh():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 12)), torch.nn.Parameter(torch.randn(4, 8) / 10)]
    moments = [torch.rand(8, 12) * 1e-6, torch.rand(4, 8) * 1e-4]
    controller = controller_of(weights)
    decay, optimizer = MaskedDecay(controller), optimizer_of(weights, moments, 3)
    decay.attach([Fragment(f"w{i}", w, w, 0, 0, w.numel()) for i, w in enumerate(weights)])
    rule = DecayRule(controller, decay, optimizer, lambda sums: sums)
    assert follow(controller, rule, 0) == [0.0, 0.0]  # nothing is known yet
    first = follow(controller, rule, 1)
    assert first == pytest.approx([wanted(w, v, 3) for w, v in zip(weights, moments)], rel=1e-6)
    assert controller.masked_decay() == pytest.approx(sum(first) / 2)
    moments[0].mul_(100)  # ten times as strong is wanted
    moments[1].mul_(1.21)
    assert follow(controller, rule, 9) == first
    assert follow(controller, rule, 10) == pytest.approx([2 * first[0], 1.1 * first[1]])
    assert follow(controller, rule, 19) == pytest.approx([2 * first[0], 1.1 * first[1]])
    moments[0].zero_()  # nothing to follow
    moments[1].mul_(1e-8)
    found = follow(controller, rule, 25)
    assert found == pytest.approx([2 * first[0], 0.55 * first[1]])
    # A run that is resumed goes on from there.
    for (state, _), value in zip(controller.weights, found, strict=True):
        other = SparseWeight(state.name, RECIPE, state.shard)
        other.decay = OwnDecay(torch.device("cpu"))
        other.import_state(state.export_state(), torch.device("cpu"))
        assert float(other.decay.value) == value and other.decay.step == 25
    assert set(RECIPE.state) <= {*controller.weights[0][0].export_state(), "mask", "flips"}


@pytest.mark.parametrize("without", ["mask", "moments", "place"])
def test_a_weight_that_nothing_is_known_of_keeps_what_it_had(without):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 12)) for _ in range(2)]
    moments = [torch.rand(8, 12), torch.rand(8, 12)]
    controller = controller_of(weights)
    decay, optimizer = MaskedDecay(controller), optimizer_of(weights, moments, 3)
    known = weights[:1] if without == "place" else weights
    decay.attach([Fragment("w", w, w, 0, 0, w.numel()) for w in known])
    if without == "mask":
        controller.weights[1][0].mask = None
    if without == "moments":
        del optimizer.state[weights[1]]
    rule = DecayRule(controller, decay, optimizer, lambda sums: sums)
    expected = pytest.approx(wanted(weights[0], moments[0], 3), rel=1e-6)
    assert follow(controller, rule, 1) == [expected, 0.0]


def test_one_weight_and_none():
    weight = torch.nn.Parameter(torch.randn(8, 12))
    for weights in ([weight], []):
        controller = controller_of(weights)
        moments = [torch.rand(8, 12) for _ in weights]
        decay = MaskedDecay(controller)
        decay.attach([Fragment("w", w, w, 0, 0, w.numel()) for w in weights])
        optimizer = optimizer_of(weights or [torch.nn.Parameter(torch.ones(1))], moments or [1], 3)
        rule = DecayRule(controller, decay, optimizer, lambda sums: sums)
        assert [value > 0 for value in follow(controller, rule, 1)] == [True] * len(weights)


def test_each_weight_is_decayed_by_its_own_and_pieces_add_up_to_the_whole():
    """ZeRO's view: two ranks with a flat tensor each, cut within the weights."""
    torch.manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(4, 8))]
    moments = [torch.rand(8, 8), torch.rand(4, 8)]
    flat, flat_v = (torch.cat([t.detach().flatten() for t in ts]) for ts in (weights, moments))
    cuts = [(0, 37), (37, 96)]
    sums, found = [], []

    def collect(own):
        sums.append(own.clone())
        return own

    for add_up in (collect, lambda own: sum(sums)):
        for begin, end in cuts:
            controller = controller_of(weights)
            decay, tensor = MaskedDecay(controller), flat[begin:end].clone()
            pieces = []
            for i, (start, stop) in enumerate(((0, 64), (64, 96))):
                low, high = max(start, begin), min(stop, end)
                if low < high:
                    name, weight = f"w{i}", weights[i]
                    place = (low - begin, low - start, high - low)
                    pieces.append(Fragment(name, weight, tensor, *place))
            decay.attach(pieces)
            optimizer = optimizer_of([tensor], [flat_v[begin:end].clone()], 2)
            found.append(follow(controller, DecayRule(controller, decay, optimizer, add_up), 1))
            if add_up is not collect:
                own = [(p.start, p.length, float(p.decay)) for p in decay.pieces(tensor)]
                values = [float(state.decay.value) for state, _ in controller.weights]
                if begin == 0:
                    assert own == [(0, 37, values[0])]
                else:
                    assert own == [(0, 27, values[0]), (27, 32, values[1])]
    expected = [wanted(w, v, 2) for w, v in zip(weights, moments)]
    assert found[2] == found[3] == pytest.approx(expected, rel=1e-6)


def test_the_update_uses_it():
    """FST's rule with each weight's own lambda, in units of the optimizer's."""
    torch.manual_seed(2)
    weights = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    controller = controller_of(weights)
    decay = MaskedDecay(controller)
    decay.attach([Fragment(f"w{i}", w, w, 0, 0, 64) for i, w in enumerate(weights)])
    optimizer = MaskedAdamW(weights, lambda _: True, decay.pieces, lr=0.1, weight_decay=0.0)
    rule = DecayRule(controller, decay, optimizer, lambda sums: sums)
    optimizer.decay = controller.decay_factor()
    for (state, weight), own in zip(controller.weights, (0.5, 2.0), strict=True):
        state.decay.value.fill_(own)
        weight.grad = torch.randn(8, 8)
    before = [w.detach().clone() for w in weights]
    optimizer.step()
    for weight, old, own in zip(weights, before, (0.5, 2.0), strict=True):
        gradient = weight.grad + own * old * ~transposable24_mask(old)
        first = optimizer.state[weight]["exp_avg"]
        torch.testing.assert_close(first, 0.1 * gradient)
        torch.testing.assert_close(weight.detach(), old - 0.1 * gradient.sign(), atol=1e-4, rtol=0)
    assert rule is not None


def test_what_it_does_not_go_with_is_refused():
    for name in ("s_ste", "ast", "ste"):
        with pytest.raises(
            ConfigError, match=f"recipe {name}: masked_decay_rho.*expected sr_ste or fst"
        ):
            make_recipe(name, masked_decay_rho=RHO)
    with pytest.raises(ConfigError, match="masked_decay 0.1 with masked_decay_rho 0.05"):
        make_recipe("fst", masked_decay=0.1, masked_decay_rho=RHO)
    with pytest.raises(
        ConfigError, match="with masked_decay_before_clipping, expected one of the two"
    ):
        make_recipe("fst", masked_decay_before_clipping=True, masked_decay_rho=RHO)
    with pytest.raises(ConfigError, match="only a run of megasparse"):
        recipe_with("fst", {"masked_decay_rho": RHO}, None)


FOLLOWING = [
    *BASE, *GPT, *SHALLOW, "--masked-decay", "none", "--masked-decay-rho", "0.05",
    "--masked-decay-update-interval", "3", "--log-interval", "1", "--train-iters", "8",
]  # fmt: skip


@pytest.mark.parametrize("layout", [TP2, [*zero(1)]], ids=["tp 2", "dp 2, zero 1"])
def test_layouts_follow_alike(tmp_path, dataset, layout):
    rows = {}
    for world, flags in ((1, []), (2, layout)):
        run_dir = ["--data-path", dataset, "--run-dir", str(tmp_path / str(world))]
        rows[world] = dist.run(traced, world, [*FOLLOWING, *flags, *run_dir])[0]
    decays = [row["masked_decay"] for row in rows[1]]
    assert decays[0] == 0.0 and len(set(decays)) == 4  # from steps 2, 4, and 7 on
    assert [row["masked_decay"] for row in rows[2]] == pytest.approx(decays, rel=1e-4)
    losses = [row["loss"] for row in rows[1]]
    assert [row["loss"] for row in rows[2]] == pytest.approx(losses, rel=2e-6)


def test_a_resumed_run_follows_as_the_undisturbed_one(tmp_path, dataset):
    def run(name, *flags):
        place = ["--data-path", dataset, "--run-dir", str(tmp_path / name)]
        return dist.run(traced, 1, [*FOLLOWING, *place, *flags])[0]

    whole = run("whole")
    parts = [*run("parts", "--exit-interval", "5"), *run("parts", "--resume")]
    for key in ("loss", "masked_decay", "masks"):
        assert [row[key] for row in parts] == [row[key] for row in whole], key
