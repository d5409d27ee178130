"""The choice of a decay from flip rates, on made-up numbers."""

from __future__ import annotations

import pytest

from megasparse.errors import MegasparseError
from megasparse.sparsity.decay_choice import Run, choose, judge, table


def made_up(ratios: dict[float, float | None]):
    """Dense at flip rate 0.02 and candidates at these multiples of it; None: diverged."""
    dense = Run("dense", None, ((8, 0.03), (16, 0.02)), 5.0)
    runs = [
        Run(f"decay-{decay:g}", decay, (), None, diverged=True)
        if mu is None
        else Run(f"decay-{decay:g}", decay, ((8, 0.5), (16, 0.02 * mu)), 5.1)
        for decay, mu in ratios.items()
    ]
    return dense, judge(dense, runs)


@pytest.mark.parametrize(
    "ratios, choice, reason",
    [
        ({1e-5: 1.0, 1e-4: 0.9, 1e-3: 0.3}, 1e-4, "of 1 feasible decay"),
        ({1e-3: 0.62, 1e-5: 0.94, 1e-4: 0.76}, 1e-4, "of 3 feasible decays"),
        ({1e-5: 0.94, 1e-4: 0.93, 1e-3: 0.1}, 1e-4, "nearest to the middle"),
        ({1e-5: 0.875, 1e-4: 0.675}, 1e-5, "mu 0.875"),  # equally near: the smaller
        ({1e-5: 0.95, 1e-4: 0.2}, 1e-5, "mu 0.950"),  # the bounds belong to the range
        ({1e-5: 1.1, 1e-4: 0.6}, 1e-4, "mu 0.600"),
        ({1e-5: 1.3, 1e-4: 0.96}, None, "all are too small, try decays above 0.0001"),
        ({0.0: 1.0, 1e-5: 0.97}, None, "all are too small, try decays above 1e-05"),
        ({1e-5: 0.0, 1e-4: 0.2}, None, "all are too large, try decays below 1e-05"),
        ({1e-5: 0.59, 1e-4: 0.2}, None, "all are too large, try decays below 1e-05"),
        ({1e-5: 1.0, 1e-4: 0.97, 1e-3: 0.5, 1e-2: 0.1}, None, "between 0.0001 and 0.001"),
        ({1e-5: 0.5, 1e-4: 1.2}, None, "mu does not fall with the decay"),
        ({1e-5: 0.8, 1e-4: None}, 1e-5, "of 1 feasible decay"),
        ({1e-5: None, 1e-4: None}, None, "every run diverged"),
        ({1e-5: 1.0, 1e-4: None}, None, "try decays above 1e-05"),
    ],
)
def test_the_rule(ratios, choice, reason):
    dense, candidates = made_up(ratios)
    assert [c.decay for c in candidates] == sorted(ratios)
    taken, why = choose(candidates)
    assert taken == choice and reason in why
    lines = table(dense, candidates, taken).splitlines()
    assert len(lines) == 2 + len(ratios)
    assert lines[1].split() == ["dense", "0.02000", "1.000", "5.0000"]
    assert sum(line.endswith("taken") for line in lines) == (choice is not None)


def test_a_dense_run_without_flips_gives_no_ratio():
    dense = Run("dense", None, ((8, 0.0),), 5.0)
    with pytest.raises(MegasparseError, match="flipped nothing at step 8"):
        judge(dense, [Run("decay-0.1", 0.1, ((8, 0.1),), 5.0)])
