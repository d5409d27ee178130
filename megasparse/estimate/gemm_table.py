"""Measured rates of GEMMs and of memory on one kind of GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megasparse.input_files import read_regular


class GemmTable:
    """Measured rates of one kind of GPU.

    Args:
        path: a file like tools/results/gemm-h200.json, which says what its fields are.
    """

    def __init__(self, path: Path) -> None:
        self.data: dict[str, Any] = json.loads(read_regular(path))

    def seconds(
        self, tokens: int, outputs: int, inputs: int, sparse: bool, dtype: str = "bf16"
    ) -> float:
        """Of one GEMM, at the rate of the nearest measured shape (by ratios of the sizes).

        Args:
            sparse: by 2:4 tensor cores, or densely where that is faster.
            dtype: bf16 or fp8.
        """
        rate = self._rate(tokens, outputs, inputs, dtype)
        if sparse:
            fast = self._rate(tokens, outputs, inputs, f"{dtype}_24")
            rate = max(rate, fast / self.data["in_a_step"]["sparse"])
        return 2.0 * tokens * outputs * inputs / (rate * 1e12)

    def _rate(self, tokens: int, outputs: int, inputs: int, kind: str) -> float:
        wanted = [math.log(size) for size in (tokens, outputs, inputs)]

        def distance(row: dict[str, Any]) -> float:
            return sum(abs(math.log(row[n]) - w) for n, w in zip("TNK", wanted, strict=True))

        found: float = min((row for row in self.data["rows"] if kind in row), key=distance)[kind]
        return found

    def moving(self, nbytes: float, what: str = "copy") -> float:
        """Seconds to move bytes at a measured or assumed bandwidth."""
        return nbytes / (self.data[f"{what}_gbps"] * 1e9)
