"""A run that changes its layout halfway continues as if nothing had happened."""

from __future__ import annotations

import pytest

from tests import dist
from tests.parallel.layouts import (
    BASE,
    CP2,
    GPT,
    LLAMA_STYLE,
    PP2,
    PP4,
    S_STE,
    SP,
    STEPS,
    TP2,
    TP4,
    zero,
)
from tests.parallel.trace import traced

TOLERANCE = 2e-6
STYLES = {"gpt fst": [*BASE, *GPT], "llama s_ste": [*BASE, *LLAMA_STYLE, *S_STE]}
ONE: tuple[int, list[str]] = (1, [])
# style, layout that saves, layout that continues
CASES = [
    ("gpt fst", ONE, (2, PP2)),
    ("gpt fst", (2, [*PP2, *zero(1)]), (1, [])),
    ("gpt fst", (2, TP2), (2, zero(2))),
    ("gpt fst", (4, [*TP2, *PP2]), (2, [*zero(1)])),
    ("gpt fst", (2, zero(2)), (4, [*TP2, *SP, *PP2, *zero(1)])),
    ("gpt fst", (2, zero(3)), (2, PP2)),
    ("gpt fst", (4, [*CP2, *zero(1)]), (2, CP2)),
    ("llama s_ste", (2, TP2), (4, [*TP2, *zero(3)])),
    ("llama s_ste", (4, [*PP4, *zero(1)]), (2, TP2)),
    ("llama s_ste", (4, [*PP2, *zero(1)]), (4, [*TP4, *SP])),
    ("llama s_ste", (2, [*TP2, *zero(1)]), (4, PP2)),
]

_undisturbed: dict[str, list] = {}


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][1:]}")
def test_another_layout_continues_the_run(tmp_path, dataset, case):
    style, (world_a, flags_a), (world_b, flags_b) = CASES[case]
    base = [*STYLES[style], "--data-path", dataset]
    if style not in _undisturbed:
        flags = [*base, "--run-dir", str(tmp_path / "one")]
        _undisturbed[style] = dist.run(traced, 1, flags)[0]
    one = _undisturbed[style]
    run = [*base, "--run-dir", str(tmp_path / "run")]
    # Step 3 is no step of FST's mask refreshes: the stored masks are those of the next steps.
    first = dist.run(traced, world_a, [*run, *flags_a, "--exit-interval", "3"])[0]
    second = dist.run(traced, world_b, [*run, *flags_b, "--resume"])[0]
    assert [row["step"] for row in first + second] == list(range(1, STEPS + 1))
    for row, expected in zip(first + second, one, strict=True):
        assert row["samples"] == expected["samples"]
        assert row["masks"] == expected["masks"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        assert row["scales"] == pytest.approx(expected["scales"], rel=1e-5)
