"""Megatron's `--data-path` and `--split`: which datasets, in which proportions, split how.

    --data-path prefix
    --data-path prefix1 prefix2              (each dataset in full)
    --data-path 0.7 prefix1 0.3 prefix2      (samples drawn in this proportion)
    --split 969,30,1                         (train, validation, test; by documents, in order)

`data/mixture.py` says what each dataset can give.

Megatron's own parsers take what they can find (a minus sign in `--split` is dropped, a blend of an
odd form is read as prefixes); here every form but these is an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from megasparse.config.inputs import is_number
from megasparse.errors import ConfigError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Blend:
    """Datasets of a run: prefixes, and a positive weight for each, or None."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_data_path(value: str | Sequence[str], name: str = "--data-path") -> Blend:
    """Parse the words after `--data-path` (a list, or one string with spaces between them).

    Weights are returned as given; Megatron normalises them.

    Raises:
        ConfigError: no word; weights and prefixes that do not alternate; a weight that is not a
            positive finite number, or a sum that is not finite; a prefix that is empty, comes
            twice, or ends in .bin or .idx.
    """
    words = value.split() if isinstance(value, str) else list(value)
    if not words:
        raise ConfigError(f"{name}: found nothing, expected at least one dataset prefix")
    numeric = [is_number(word) for word in words]
    if not any(numeric):
        blend = Blend(tuple(words), None)
    elif len(words) % 2 == 0 and numeric == [True, False] * (len(words) // 2):
        blend = Blend(tuple(words[1::2]), tuple(float(word) for word in words[::2]))
    else:
        raise ConfigError(
            f"{name}: found {' '.join(words)!r}, expected either prefixes only or pairs of a "
            "weight and a prefix (write a prefix that is a number as ./5)"
        )
    _check_prefixes(blend.prefixes, name)
    for prefix, weight in zip(blend.prefixes, blend.weights or ()):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"{name}: found weight {weight:g} for {prefix}, expected a number above 0"
            )
    if not math.isfinite(sum(blend.weights or ())):
        raise ConfigError(f"{name}: found weights whose sum is not finite")
    return blend


def parse_split(value: str, name: str = "--split") -> tuple[float, float, float]:
    """Parse `train,valid,test` into fractions that add up to 1; missing ones at the end are 0.

    Raises:
        ConfigError: not one to three finite numbers of at least 0, or none for training.
    """
    words = [word.strip() for word in value.split(",")]
    if len(words) > len(SPLITS) or not all(is_number(word) for word in words):
        raise ConfigError(
            f"{name}: found {value!r}, expected up to three numbers such as 969,30,1 "
            f"({', '.join(SPLITS)})"
        )
    parts = [float(word) for word in words] + [0.0] * (len(SPLITS) - len(words))
    for split, part in zip(SPLITS, parts):
        if not (math.isfinite(part) and part >= 0):
            raise ConfigError(f"{name}: found {part:g} for {split}, expected a number from 0 up")
    if parts[0] == 0:
        raise ConfigError(f"{name}: found {value!r}, expected a train part above 0")
    total = sum(parts)
    if not math.isfinite(total):
        raise ConfigError(f"{name}: found {value!r}, whose sum is not finite")
    return parts[0] / total, parts[1] / total, parts[2] / total


def _check_prefixes(prefixes: Sequence[str], name: str) -> None:
    seen: set[str] = set()
    for prefix in prefixes:
        if not prefix.strip():
            raise ConfigError(f"{name}: found an empty prefix")
        if prefix.endswith((".bin", ".idx")):
            raise ConfigError(f"{name}: found {prefix}, expected it without {prefix[-4:]}")
        normal = os.path.realpath(f"{prefix}.bin")  # another name or a link is the same file
        if normal in seen:
            raise ConfigError(f"{name}: found {prefix} twice, expected different datasets")
        seen.add(normal)
