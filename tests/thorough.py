"""Tests that `make test` leaves out and `make test-all` runs, as CI does.

`make test` stays under ten minutes on two cores. Every property has a test there; what is here asks
the same of further layouts, families and combinations, or takes a run of its own for it.
"""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
# file: names of tests, or the beginnings of names, parameters included.
THOROUGH: dict[str, tuple[str, ...]] = {}


def is_thorough(path: Path, name: str) -> bool:
    """Whether a test is left to `make test-all`.

    Args:
        path: of its file.
        name: with its parameters, as pytest shows it after `::`.
    """
    if not path.is_relative_to(TESTS):
        return False
    return name.startswith(THOROUGH.get(str(path.relative_to(TESTS)), ()))
