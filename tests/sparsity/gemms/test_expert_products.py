"""Which products compute a layer's experts: ranges of tokens, streams, and one launch for all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasparse.kernels.packed24 import E4M3
from megasparse.sparsity.gemms import expert_products
from megasparse.sparsity.gemms.choice import Choice
from megasparse.sparsity.gemms.expert_products import ExpertChoice, ExpertChoices


class Chooser:
    """Gives a choice, and notes what it was asked."""

    def __init__(self, choice):
        self.choice, self.asked = choice, []

    def choose(self, key, flops, sparse, dense):
        self.asked.append((key, flops, sparse(3), dense()))
        return self.choice


def products(algorithm, streams):
    return algorithm, streams


@pytest.mark.parametrize(
    ("rows", "rounded"),
    [
        (1, 64),
        (64, 64),
        (65, 128),
        (1023, 1024),
        (1024, 1024),
        (1025, 1152),
        (4096, 4096),
        (4609, 5120),
    ],
)
def test_a_range_is_up_to_the_next_eighth_of_a_power_of_2(rows, rounded):
    chooser = Chooser(Choice(2, 0.0, 0.0))
    choices = ExpertChoices(3, "e4m3")
    found = choices.choose(chooser, "output", (8, 16), rows, products, lambda: "dense")
    assert found == ExpertChoice(2, dense_wins=False, streams=())
    key = f"3 experts, output T {rounded}, N 8, K 16, e4m3"
    assert chooser.asked == [(key, 2 * 8 * 16 * rows, (3, ()), "dense")]
    again = choices.choose(chooser, "output", (8, 16), rounded, products, lambda: "dense")
    assert again is found and len(chooser.asked) == 1
    choices.choose(chooser, "grad_input", (8, 16), rows, products, lambda: "dense")
    choices.choose(chooser, "output", (8, 16), rounded + 1, products, lambda: "dense")
    assert len(chooser.asked) == 3


def test_without_a_chooser_it_is_the_first_algorithm():
    found = ExpertChoices(3, "e4m3").choose(None, "output", (8, 16), 9, products, lambda: None)
    assert found == ExpertChoice(0, False, ())


@pytest.mark.parametrize(
    ("experts", "alone", "together", "dense", "expected"),
    [
        (4, 2.0, 1.0, 1.5, (False, True)),
        (4, 2.0, 1.0, 0.9, (True, True)),  # dense wins, and streams would have helped
        (4, 2.0, 1.0, 1.0, (False, True)),
        (4, 2.0, 2.0, 1.9, (True, False)),  # as fast: one after the other
        (4, 0.5, 0.4, 3.0, (False, True)),
        (1, 2.0, 1.0, 3.0, (False, False)),
        (2, 0.0, 1.0, 0.0, (False, False)),  # nothing was measured
        (4, float("inf"), 1.0, 0.0, (True, False)),  # no algorithm is right
    ],
)
def test_streams_where_they_are_faster(monkeypatch, experts, alone, together, dense, expected):
    timed, told = [], []

    def milliseconds(run, repeats):
        timed.append((run(), repeats))
        return together

    monkeypatch.setattr(expert_products, "milliseconds", milliseconds)
    monkeypatch.setattr(expert_products, "side_streams", lambda device: ("a", "b"))
    monkeypatch.setattr(expert_products, "log_once", lambda *words: told.append(words))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    chooser, choices = Chooser(Choice(5, alone, dense)), ExpertChoices(experts, "16 bits")
    found = choices.choose(chooser, "output", (8, 16), 64, products, lambda: None)
    wins, side = expected
    assert found == ExpertChoice(5, wins, ("a", "b") if side else ())
    measured = experts > 1 and 0 < alone < float("inf")
    assert timed == ([((5, ("a", "b")), 9)] if measured else [])
    assert len(told) == side


def test_one_launch_is_for_e4m3_on_a_gpu_where_the_library_is_right(monkeypatch):
    reasons, warned = [None], []
    monkeypatch.setattr(expert_products, "_grouped_disagreement", lambda device: reasons[0])
    monkeypatch.setattr(expert_products, "warn_once", lambda *words: warned.append(words[-1]))

    def asked(grouped=True, is_cuda=True, dtype=E4M3):
        like = SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device="cuda:0")
        return expert_products._in_one_launch(grouped, like)

    assert asked() and not warned
    assert not asked(grouped=False) and not asked(is_cuda=False)
    assert not asked(dtype=torch.float8_e5m2)
    reasons[0] = "output is wrong"
    assert not asked() and warned == ["output is wrong"]
