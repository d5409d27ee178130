"""float16 with GradScaler: a step that it skips leaves nothing, as if it had never been seen."""

from __future__ import annotations

import pytest
import torch

from megasparse.nn import sparsify_
from tests.nn.models import Model, loss_of, micro_batch

RECIPES = {
    "fst": {"masked_decay": 1e-2, "mask_update_interval": 2},
    "ast": {"masked_decay": 1e-2, "masked_decay_ramp_iters": 0, "mask_update_interval": 2},
    "s_ste": {},
}
STEPS, SKIPPED = 6, 2  # masks are refreshed in the step that is skipped


def _trained(recipe: str, fused: bool, seen: bool):
    """Some steps of two micro-batches, before one of which comes a step with an infinite gradient
    (`seen`), or none but the scale that it would leave."""
    model = Model()
    handle = sparsify_(model, recipe, ["*.mlp.*"], **RECIPES[recipe])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []

    def step(factors: tuple[float, float]) -> None:
        for n, factor in enumerate(factors):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, micro_batch(len(losses), n)) / 2
            scaler.scale(loss * factor).backward()
        if not fused:  # which divides the gradients by the scale itself
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())

    for number in range(STEPS):
        if number == SKIPPED and seen:
            step((1.0, torch.inf))
            assert handle.step_number == SKIPPED and losses.pop()
        elif number == SKIPPED:
            scaler.update(scaler.get_scale() / 2)
        step((1.0, 1.0))
    assert scaler.get_scale() == 2.0**9 and handle.step_number == STEPS
    return model, handle, optimizer, losses


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_skipped_step_leaves_nothing(recipe, fused):
    (model, handle, optimizer, losses), expected = (
        _trained(recipe, fused, seen) for seen in (True, False)
    )
    assert losses == expected[3] and losses[-1] < losses[0]
    for one, other in zip(model.parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(one, other)
        for name, moment in optimizer.state[one].items():
            assert torch.equal(moment, expected[2].state[other][name]), name
    state, known = handle.state_dict(), expected[1].state_dict()
    assert state["step"] == known["step"] == STEPS and handle.metrics() == expected[1].metrics()
    for name, kept in state["layers"].items():
        assert kept.keys() == known["layers"][name].keys()
        for key, value in kept.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(known["layers"][name][key]))
        layer, other = handle.layers[name], expected[1].layers[name]
        assert layer._draws == other._draws
        assert layer.state.preparations == other.state.preparations
    assert len(handle.verify()) == 4


def test_the_decay_is_of_unscaled_gradients():
    """One step of plain gradient descent, with a scale and without: the same weights."""
    weights = []
    for scale in (2.0**10, None):
        model = Model()
        sparsify_(model, "sr_ste", ["*.mlp.*"], masked_decay=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        loss = loss_of(model, micro_batch(0, 0))
        if scale is None:
            loss.backward()
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        weights.append([p.detach() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
