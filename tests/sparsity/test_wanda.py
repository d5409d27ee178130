"""Wanda's figures: sums over steps, and the mask that they choose."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.sparsity.wanda import InputNorms, finish_step


def _same(tensor):
    return tensor


def test_sums_are_those_of_all_tokens_and_a_dropped_step_leaves_no_trace():
    a, b = InputNorms(), InputNorms()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, 8, generator=generator) for _ in range(4)]
    for batch in batches[:3]:
        a.observe(batch)
        b.observe(batch[..., :4])
        finish_step([(a, False), (b, False)], _same, _same)
    a.observe(batches[3] * torch.nan)
    a.drop()
    finish_step([(a, False), (b, False)], _same, _same)
    tokens = torch.cat([batch.reshape(-1, 8) for batch in batches[:3]]).double()
    assert a.tokens == b.tokens == 18
    torch.testing.assert_close(a.square, tokens.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(b.square, a.square[:4])


def test_only_inputs_split_over_the_sequence_are_summed_over_tensor_parallel_ranks():
    whole, split = InputNorms(), InputNorms()
    for one in (whole, split):
        one.observe(torch.ones(5, 4))
    finish_step([(whole, False), (split, True)], lambda t: t * 3, lambda t: t * 2)
    assert (whole.tokens, split.tokens) == (15, 30)
    assert whole.square.tolist() == [15.0] * 4 and split.square.tolist() == [30.0] * 4


def test_the_mask_weighs_channels_by_their_inputs():
    recipe = make_recipe("ast", mask_metric="wanda")
    state = SparseWeight("w", recipe, WeightShard((1, 8)))
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0, 1.0, -2.0, 3.0, 4.0]])
    state.gemms(weight, 0, True, True)  # before any input: by magnitude
    assert state.mask.tolist() == [[True, True, False, False, False, False, True, True]]
    x = torch.tensor([1.0, 1.0, 10.0, 10.0, 10.0, 10.0, 1.0, 1.0])
    state.inputs.observe(x.expand(6, 8))
    finish_step([(state.inputs, False)], _same, _same)
    state.gemms(weight, 9, True, True)  # not due
    assert state.mask[0, 0]
    state.gemms(weight, 10, True, True)
    assert state.mask.tolist() == [[False, False, True, True, True, True, False, False]]
    # The pruned weight keeps its values: the norms only choose.
    effective = state.effective(weight)
    assert effective.tolist() == [[0.0, 0.0, 2.0, 1.0, 1.0, -2.0, 0.0, 0.0]]
    other = SparseWeight("w", recipe, WeightShard((1, 8)))
    other.import_state(state.export_state(), torch.device("cpu"))
    assert torch.equal(other.inputs.square, state.inputs.square) and other.inputs.tokens == 6


@pytest.mark.parametrize("name", ["fst", "s_ste", "dense"])
def test_only_row_wise_masks_look_at_inputs(name):
    with pytest.raises(ConfigError, match="mask_metric wanda with the recipe"):
        make_recipe(name, mask_metric="wanda")


def test_the_score_is_the_weight_times_the_root_mean_square():
    inputs = InputNorms()
    inputs.observe(torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 7.0]]))
    finish_step([(inputs, False)], _same, _same)
    weight = torch.tensor([[2.0, -5.0, -1.0]])
    expected = torch.tensor([[2.0 * 12.5**0.5, -0.0, -5.0]])
    torch.testing.assert_close(inputs.scale(weight), expected)


def test_what_a_checkpoint_says_replaces_what_was_seen():
    source, other, fresh = InputNorms(), InputNorms(), InputNorms()
    for one, size in ((source, 2.0), (other, 5.0)):
        one.observe(torch.full((3, 4), size))
        finish_step([(one, False)], _same, _same)
        one.observe(torch.full((7, 4), 100.0))  # of a step that is not over
    assert fresh.export_state() == {}
    other.import_state(source.export_state(), torch.device("cpu"))
    finish_step([(other, False)], _same, _same)
    assert other.tokens == 3 and other.square.tolist() == [12.0] * 4
    other.import_state(fresh.export_state(), torch.device("cpu"))
    assert other.tokens == 0 and other.square is None
    other.observe(torch.ones(2, 4))
    finish_step([(other, False)], _same, _same)
    assert other.tokens == 2


def test_a_skipped_step_leaves_none_of_its_inputs():
    state = SparseWeight("w", make_recipe("ast", mask_metric="wanda"), WeightShard((1, 8)))
    state.gemms(torch.ones(1, 8), 0, True, True)
    state.inputs.observe(torch.ones(2, 8))
    finish_step([(state.inputs, False)], _same, _same)
    before = state.snapshot()
    state.inputs.observe(torch.full((3, 8), 100.0))
    state.restore(before)
    finish_step([(state.inputs, False)], _same, _same)
    assert state.inputs.tokens == 2 and state.inputs.square.tolist() == [2.0] * 8
