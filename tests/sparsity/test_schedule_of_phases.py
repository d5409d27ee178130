"""A run as a schedule of phases: its text, its steps, and a weight that lives through it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from megasparse.config import load_config
from megasparse.errors import ConfigError
from megasparse.kernels import is_24, prune24_mask, transposable24_mask
from megasparse.sparsity import schedule
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.phases import parse, summary
from megasparse.sparsity.recipe import PRESETS, make_recipe, recipe_with
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight


def _spans(recipe, steps):
    return [(s.number, s.steps.start, s.steps.stop) for s in schedule.spans(recipe, steps)]


def test_a_text_is_names_shares_and_options():
    phases = parse("dense:0.1, fst:0.57,row+grad-input=double-pruned+mvue=off+decay=2e-4:0.33")
    assert [(p.name, p.share) for p in phases] == [
        ("dense", Fraction(1, 10)),
        ("fst", Fraction(57, 100)),
        ("row", Fraction(33, 100)),
    ]
    assert phases[2].settings == {
        "sparse_grad_input": "double-pruned",
        "mvue": "off",
        "masked_decay": 2e-4,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fst:0.5,row:0.4", "shares sum to 0.9, expected 1"),
        ("fst:2/3,row:2/3", "shares sum to 1.33333, expected 1"),
        ("fst", "phase 'fst', expected NAME"),
        ("fst:1,", "phase '', expected NAME"),
        ("fst:0,row:1", "'fst:0' has the share '0', expected a number above 0"),
        ("fst:one", "has the share 'one'"),
        ("fst:1/0", "has the share '1/0'"),
        ("fst:3/2", "has the share '3/2'"),
        (":1", "phase ':1', expected NAME"),
        ("cols:1", "phase 'cols', expected one of transposable, row, soft_threshold, dense, ste"),
        ("fst+mvue:1", "has mvue=, expected off, exact, approximate"),
        ("fst+mvu=off:1", "has the option 'mvu=off', expected grad-input=VALUE, mvue=VALUE"),
        ("row+decay=-1:1", "has decay=-1, expected a number of at least 0"),
        ("row+mvue=off+mvue=off:1", "sets an option twice"),
        ("dense+mvue=off:1", "a phase `dense` has options, expected none"),
        ("fst+grad-input=double-pruned:1", "expected weights that are 2:4 by rows alone"),
        ("s_ste+decay=1e-4:1", "needs a mask"),
        ("fst_relaxed:1", "phase 'fst_relaxed', expected one of"),
    ],
)
def test_what_is_wrong_with_a_text_is_named(text, words):
    with pytest.raises(ConfigError) as error:
        make_recipe("fst", sparsity_phases=text)
    assert words in str(error.value) and "\n" not in str(error.value)


def _of(*flags):
    return recipe_of(load_config(["--mock-data", *flags]))


def test_the_flags_of_a_run_make_its_schedule():
    with pytest.raises(ConfigError, match=r"names no recipe .* or --sparsity-recipe"):
        _of("--sparsity-phases", "row:1/2,dense:1/2")
    with pytest.raises(ConfigError, match="expected phases alone"):
        _of("--sparsity-phases", "fst:1", "--dense-tail-fraction", "0.1")
    with pytest.raises(ConfigError, match="expected a row-wise mask"):
        _of("--sparsity-phases", "ste:1/2,fst:1/2", "--slorb-k", "4", "--sparsity-recipe", "ste")
    with pytest.raises(ConfigError, match="expected phases that are dense, row or ast"):
        _of(
            *("--sparsity-recipe", "ast", "--mask-metric", "wanda"),
            *("--sparsity-phases", "ast:1/2,fst:1/2"),
        )
    with pytest.raises(ConfigError, match="expected train_iters with it"):
        recipe_with("fst", {"sparsity_phases": "fst:1"}, None)
    # The run's recipe is the first that a phase names; its flags reach the phases that are its own.
    recipe = _of("--sparsity-phases", "dense:0.1,fst:0.57,row:0.33", "--masked-decay", "1e-3")
    assert recipe.name == "fst" and recipe.dense_tail_fraction == 0
    dense, fst, row = (phase.recipe for phase in recipe.phases)
    assert not dense.is_sparse and (fst.projection, row.projection) == ("transposable", "row")
    assert fst.masked_decay == row.masked_decay == 1e-3 and fst.mvue == row.mvue == "exact"
    assert _spans(recipe, 100) == [(0, 0, 10), (1, 10, 67), (2, 67, 100)]


def test_a_rho_is_of_all_phases_that_decay_and_of_no_other():
    rho = {"masked_decay_rho": 0.05}
    made = make_recipe("fst", sparsity_phases="dense:1/4,fst:1/2,row:1/4", **rho)
    assert [phase.recipe.masked_decay_rho for phase in made.phases][1:] == [0.05, 0.05]
    make_recipe("fst", sparsity_phases="dense:1/2,fst:1/2", **rho)  # dense training has none
    for text in ("fst:1/2,sr_ste:1/2", "sr_ste:1/2,dense:1/2"):
        with pytest.raises(ConfigError, match=r"masked_decay_rho 0.05 with .* recipe alone"):
            make_recipe("fst", sparsity_phases=text, **rho)
    with pytest.raises(ConfigError, match="expected one of"):
        make_recipe("fst", sparsity_phases="fst(masked_decay=1e-3):1/2,dense:1/2", **rho)


def test_a_phase_has_a_decay_of_its_own_where_no_rho_gives_it():
    text = "fst:1/2,row+decay=0:1/4,s_ste:1/4"
    made = make_recipe("fst", sparsity_phases=text, masked_decay=1e-3)
    assert [phase.recipe.masked_decay for phase in made.phases] == [1e-3, 0.0, 0.0]
    with pytest.raises(ConfigError, match="masked_decay_rho 0.05 with a phase's decay"):
        make_recipe("fst", sparsity_phases=text, masked_decay_rho=0.05)
    soft = (
        make_recipe(
            "fst",
            sparsity_phases="fst:1/2,soft_threshold:1/2",
            masked_decay=1e-3,
            masked_decay_before_clipping=True,
        )
        .phases[1]
        .recipe
    )
    assert (soft.regulariser, soft.masked_decay, soft.masked_decay_rho) == ("none", 0.0, None)
    assert not soft.masked_decay_before_clipping


def test_groups_of_mvue_are_of_the_phases_that_draw():
    text = "fst:1/4,s_ste:1/4,ste:1/4,row+mvue=off:1/4"
    made = make_recipe("fst", sparsity_phases=text, mvue_groups="strided")
    groups = [phase.recipe.mvue_groups for phase in made.phases]
    assert groups == ["strided", "strided", "neighbours", "neighbours"]


@pytest.mark.parametrize("name", PRESETS)
def test_shares_are_a_whole_run(name):
    assert sum(phase.share for phase in PRESETS[name].phases) == 1


def test_dense_fractions_are_phases_said_shorter():
    short = make_recipe("fst", dense_warmup_fraction=0.375, dense_tail_fraction=1 / 6)
    text = make_recipe("fst", sparsity_phases="dense:0.375,fst:11/24,dense:1/6")
    for steps in (1, 2, 3, 7, 8, 9, 300, 1001):
        made = [schedule.spans(recipe, steps) for recipe in (short, text)]
        assert made[0] == made[1], steps
    assert _spans(PRESETS["fst"], 9) == [(0, 0, 7), (1, 7, 9)]  # half a step is no step of the tail


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("fst:1/2,dense:1/2", 5, [(0, 0, 2), (1, 2, 5)]),  # of half a step: nearer to its own end
        ("fst:5/14,dense:9/14", 7, [(0, 0, 2), (1, 2, 7)]),
        ("dense:9/14,fst:5/14", 7, [(0, 0, 5), (1, 5, 7)]),
        ("dense:1/100,fst:98/100,row:1/100", 9, [(1, 0, 9)]),  # too short for a step
    ],
)
def test_steps_of_shares(text, steps, expected):
    assert _spans(make_recipe("fst", sparsity_phases=text), steps) == expected


def test_dense_phases_know_the_masks_before_them_or_else_behind():
    for text, known in (
        ("dense:1/2,fst:1/2", "fst fst"),
        ("fst:1/2,dense:1/2", "fst fst"),
        ("dense:1/8,dense:1/8,ste:1/4,dense:1/4,fst:1/8,dense:1/8", "ste ste ste ste fst fst"),
    ):
        recipe = make_recipe("fst", sparsity_phases=text)
        found = [span.masks.name for span in schedule.spans(recipe, 16)]
        assert found == known.split()
    last = make_recipe("fst", sparsity_phases="fst:9/10,dense:1/10")
    assert [schedule.is_sparse_step(last, step, 10) for step in (8, 9, 10, 99)] == [True] + 3 * [
        False
    ]


def test_a_dense_step_of_cast_decays_no_share():
    cast = make_recipe("cast", dense_warmup_fraction=0.5)
    assert [schedule.decayed_share(cast, step, 8) for step in (0, 3, 4, 6)] == [0, 0, 0, 0.5]


def test_presets_with_phases():
    relaxed = PRESETS["fst_relaxed"]
    first, last = (phase.recipe for phase in relaxed.phases)
    assert first.sparse_gemms == last.sparse_gemms == ("output", "grad_input", "grad_weight")
    assert (first.projection, last.projection) == ("transposable", "row") and last.double_pruned
    assert _spans(relaxed, 9) == [(0, 0, 6), (1, 6, 9)]
    assert "grad_input double-pruned; MVUE exact; decay 6e-05" in summary(last)
    tail = make_recipe(
        "fst_relaxed", sparsity_phases="transposable:2/3,row+mvue=off:1/3", masked_decay=1e-3
    )
    assert [p.recipe.masked_decay for p in tail.phases] == [1e-3, 1e-3]
    assert tail.phases[1].recipe.sparse_gemms == ("output",)


EVERY = (
    "dense:2/14,fst:3/14,dense:1/14,row+grad-input=double-pruned+mvue=off:3/14,s_ste:3/14,ast:2/14"
)


def _decayed(controller):
    return [parameter is not None for parameter, _ in controller.masked_weights()]


def test_a_weight_lives_through_all_phases():
    """In each it has the operands of a weight that knows that phase's recipe alone."""
    recipe = make_recipe("fst", sparsity_phases=EVERY, mask_update_interval=2, masked_decay=1e-3)
    controller = SparsityController(recipe, Clock(0, 14))
    state = SparseWeight("w", recipe, WeightShard((8, 12)))
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 12))
    controller.register(state, weight, 0)
    eye, alone, seen = torch.eye(12), None, []
    for step in range(14):
        controller.clock.step = step
        span = controller.span
        gemms = state.gemms(weight, step, controller.sparse_now, True)
        if step == span.steps.start:
            alone = SparseWeight("w", span.masks, WeightShard((8, 12)))
            assert state.last_refresh == step or not span.recipe.is_sparse
        expected = alone.gemms(weight, step, span.recipe.is_sparse, True)
        assert torch.equal(gemms.output(eye), expected.output(eye))
        dz = gemms.prepare_grad_output(torch.eye(8), 1)
        assert torch.equal(gemms.grad_input(dz), expected.grad_input(dz))
        x = torch.randn(8, 12)
        assert torch.equal(gemms.grad_weight(dz, (x,)), expected.grad_weight(dz, (x,)))
        decays = span.recipe.regulariser != "none"
        assert _decayed(controller) == ([True] if decays else [])
        assert (controller.masked_decay() > 0) == (decays and step != 12)  # AST's ramp begins at 0
        assert state.mask_transposable == span.masks.transposable
        search = transposable24_mask if span.masks.transposable else prune24_mask
        if state.last_refresh == step:
            assert torch.equal(state.mask, search(weight))
        seen.append((span.number, int(state.flips) if state.flips is not None else None))
        # A resume in any step, or after it, finds the mask of its kind.
        copy = SparseWeight("w", recipe, WeightShard((8, 12)))
        copy.train_iters = 14
        copy.import_state(state.export_state(), torch.device("cpu"))
        assert torch.equal(copy.mask, state.mask)
        assert copy.mask_transposable == state.mask_transposable
        again = copy.gemms(weight, step, span.recipe.is_sparse, True)
        assert torch.equal(again.output(eye), gemms.output(eye))
        if span.recipe.is_sparse:
            assert torch.equal(copy.effective_at(weight, step), alone.effective_at(weight, step))
        with torch.no_grad():
            weight.add_(0.3 * torch.randn(8, 12))
    assert [number for number, _ in seen] == [0] * 2 + [1] * 3 + [2] + [3] * 3 + [4] * 3 + [5] * 2
    assert all(flips for number, flips in seen[3:])
    assert is_24(copy.effective_at(weight, 14)) and not is_24(copy.effective_at(weight, 14), dim=0)


def test_a_skipped_step_puts_back_the_mask_of_the_phase_before():
    recipe = make_recipe("fst", sparsity_phases="fst:1/2,row:1/2")
    state, weight = SparseWeight("w", recipe, WeightShard((8, 12))), torch.randn(8, 12)
    state.train_iters = 4
    for step in range(2):
        state.gemms(weight, step, True, True)
    before, saved = state.mask.clone(), state.snapshot()
    state.gemms(weight, 2, True, True)
    assert not state.mask_transposable and not torch.equal(state.mask, before)
    state.restore(saved)
    assert state.mask_transposable and torch.equal(state.mask, before)
    assert torch.equal(
        state.gemms(weight, 3, True, True).output(torch.eye(12)).t() != 0, prune24_mask(weight)
    )
