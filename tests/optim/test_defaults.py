"""What is on, and how much, where nobody says anything: a default that changes is noticed."""

from __future__ import annotations

from tests.defaults import check

# A switch that is not here is off.
WRITTEN: dict[str, dict[str, object]] = {
    "optim.decay_rule": {
        "MOST": 2.0,
    },
}


def test_defaults_are_as_written():
    check("optim", WRITTEN)
