"""Speeds that equal_time.py counts steps by: which are measured, and a variant's of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megasparse.errors import DataError
from tools.experiments.recipe_variants import ALL_VARIANTS, FP8

SPEEDS = "speeds.json"
# What is measured for a variant: the fastest of these trains as many steps as it does.
FASTEST = {
    "dense": ("dense", "te bf16 fused"),
    "dense_fp8": ("dense_fp8", "te fp8 fused"),
}
# Phases, with their shares of the steps.
PARTS = {
    "fst_tail_fp8": {"fst_fp8": 5 / 6, "dense_fp8": 1 / 6},
    "fst_relaxed_fp8": {"fst_fp8": 2 / 3, "row": 1 / 3},
    "fst_tail": {"fst": 5 / 6, "dense": 1 / 6},
}
# Flags of what is measured: variants, the row-wise phase of fst_relaxed, and the layers of
# Transformer Engine, which `tools.bench.train` knows by their names.
MEASURED = ALL_VARIANTS | {
    "row": [*ALL_VARIANTS["sr_ste_double_pruned"], *FP8],
    "te bf16 fused": ALL_VARIANTS["dense"],
    "te fp8 fused": ALL_VARIANTS["dense"],
}


@dataclass(frozen=True)
class Speeds:
    """tokens/s by name, and where they were measured."""

    hardware: str
    rates: dict[str, float]


def needed(variants: Sequence[str]) -> list[str]:
    """What is to be measured."""
    names: dict[str, None] = {}
    for variant in variants:
        for name in FASTEST.get(variant, tuple(PARTS.get(variant, (variant,)))):
            names[name] = None
    return list(names)


def rate_of(variant: str, rates: dict[str, float]) -> float:
    """tokens/s of a variant, of what was measured (see FASTEST and PARTS)."""
    if variant in FASTEST:
        return max(rates[name] for name in FASTEST[variant])
    parts = PARTS.get(variant, {variant: 1.0})
    return 1 / sum(share / rates[name] for name, share in parts.items())


def read_speeds(output: Path) -> Speeds | None:
    """What was measured; None: nothing.

    Raises:
        DataError: the file is none of these.
    """
    path = output / SPEEDS
    if not path.exists():
        return None
    try:
        return Speeds(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not what equal_time.py writes: {error}") from None
