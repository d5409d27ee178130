"""The losses of experts: how much they weigh in a step, and which numbers are logged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

balance = pytest.importorskip("megasparse.megatron.balance")
moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")


def _grid(tp_size=1, dp_cp_size=1, cp_size=1):
    def tripled(sums):
        return sums.mul_(3)

    return SimpleNamespace(
        tp_size=tp_size,
        dp_cp_size=dp_cp_size,
        cp_size=cp_size,
        device=torch.device("cpu"),
        sum_over_model=tripled,
        sum_over_dp_cp=lambda sums: sums,
    )


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_micro_batch_weighs_its_part_of_the_step(micro_batches):
    tracked = balance.get_moe_layer_wise_logging_tracker
    moe_utils.save_to_aux_losses_tracker("z_loss", torch.ones(()), layer_number=1, num_layers=2)
    assert any(entry["values"].any() for entry in tracked().values())
    balance.begin_step(micro_batches)
    assert not any(entry["values"].any() for entry in tracked().values())
    gradients = []
    for _ in range(micro_batches):
        loss = torch.ones((), requires_grad=True)
        x = torch.ones(3, requires_grad=True)
        balance.MoEAuxLossAutoScaler.apply(x, loss).sum().backward()
        gradients.append(float(loss.grad))
    assert sum(gradients) == pytest.approx(1.0)
    tracked().clear()


def test_losses_are_means_over_layers_and_micro_batches(monkeypatch):
    tracker = {
        "load_balancing_loss": {"values": torch.tensor([1.0, 2.0]), "reduce_group": object()},
        "seq_load_balancing_loss": {"values": torch.tensor([0.5, 0.5]), "reduce_group": object()},
        "z_loss": {"values": torch.tensor([4.0, 8.0]), "reduce_group": None},
    }
    monkeypatch.setattr(balance, "get_moe_layer_wise_logging_tracker", lambda: tracker)
    found = balance.losses_of_step(_grid(tp_size=2, dp_cp_size=5), layers=2, micro_batches=3)
    # Summed over the model (three times here), by layers, micro-batches and replicas.
    expected = {"load_balancing_loss": 3 * 4.0 / 30, "z_loss": 3 * 12.0 / 2 / 30}
    assert found == pytest.approx(expected)
    # Ranks of context parallelism have parts of a balance, and means of their own of the other.
    divided = _grid(tp_size=2, dp_cp_size=10, cp_size=2)
    found = balance.losses_of_step(divided, layers=2, micro_batches=3)
    assert found == pytest.approx({**expected, "z_loss": expected["z_loss"] / 2})
    del tracker["z_loss"]
    assert set(balance.losses_of_step(_grid(), 2, 1)) == {"load_balancing_loss"}
    tracker.clear()
    assert balance.losses_of_step(_grid(), 2, 1) == {}
