"""The chooser: wrong algorithms are rejected, the faster GEMM wins, choices are remembered."""

from __future__ import annotations

import pytest
import torch

from megasparse.sparsity.gemms import choice
from megasparse.sparsity.gemms.choice import MIN_FLOPS, Choice, GemmChooser

DENSE = torch.ones(4, 4)


@pytest.fixture
def clock(monkeypatch):
    """Times by the value that a run returns: nothing is measured on a machine without a GPU."""
    times = {}
    monkeypatch.setattr(choice, "milliseconds", lambda run, repeats: times[id(run())])
    return times


def _sparse(clock, results):
    for result, time in results.values():
        clock[id(result)] = time

    def run(algorithm):
        if algorithm not in results:
            raise RuntimeError("no such algorithm")
        return results[algorithm][0]

    return run


def test_fastest_right_algorithm_wins(clock, tmp_path):
    clock[id(DENSE)] = 3.0
    results = {
        0: (DENSE.clone(), 2.0),
        3: (DENSE * 2, 0.1),  # fast and wrong
        5: (DENSE.clone(), 1.0),
        9: (DENSE * float("nan"), 0.1),
    }
    path = tmp_path / "cache" / "gemms.json"
    choice = GemmChooser(path).choose("k", MIN_FLOPS, _sparse(clock, results), lambda: DENSE)
    assert choice == Choice(5, 1.0, 3.0, rejected=2) and not choice.dense_wins

    def never(*_):
        raise AssertionError("measured again")

    assert GemmChooser(path).choose("k", MIN_FLOPS, never, never) == choice


def test_dense_wins_when_faster_or_when_nothing_is_right(clock):
    clock[id(DENSE)] = 0.5
    right = {0: (DENSE.clone(), 2.0)}
    assert GemmChooser(None).choose("k", MIN_FLOPS, _sparse(clock, right), lambda: DENSE).dense_wins
    wrong = {0: (DENSE * 2, 0.1)}
    assert GemmChooser(None).choose("k", MIN_FLOPS, _sparse(clock, wrong), lambda: DENSE).dense_wins


def test_small_products_are_not_measured(clock):
    choice = GemmChooser(None).choose("k", MIN_FLOPS - 1, _sparse(clock, {}), lambda: DENSE)
    assert choice.algorithm == 0 and not choice.dense_wins


def test_a_damaged_cache_is_as_good_as_none(tmp_path):
    path = tmp_path / "gemms.json"
    for text in ("", "[]", '{"k": {"x": 1}}', "\x00"):
        path.write_text(text)
        assert GemmChooser(path)._choices == {}


def test_no_clock_decides_in_deterministic_mode(clock, tmp_path):
    clock[id(DENSE)] = 0.5
    results = {2: (DENSE * 2, 0.1), 3: (DENSE.clone(), 2.0), 5: (DENSE.clone(), 1.0)}
    path = tmp_path / "gemms.json"
    sparse = _sparse(clock, results)
    assert GemmChooser(path).choose("k", MIN_FLOPS, sparse, lambda: DENSE).dense_wins
    kept = path.read_text()
    torch.use_deterministic_algorithms(True)
    try:
        choice = GemmChooser(path).choose("k", MIN_FLOPS, sparse, lambda: DENSE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.algorithm == 3 and choice.rejected == 1 and not choice.dense_wins
    assert path.read_text() == kept
