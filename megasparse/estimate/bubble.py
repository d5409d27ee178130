"""The share of a step in which the stages of a pipeline wait for each other.

With p stages and m micro-batches the schedule 1F1B leaves p - 1 of m + p - 1 turns empty. With v
virtual stages on a rank (interleaved 1F1B; Narayanan et al., SC 2021, section 2.2) a turn is v
times shorter: p - 1 of v m + p - 1.
"""

from __future__ import annotations


def bubble_fraction(stages: int, micro_batches: int, virtual_stages: int = 1) -> float:
    """Idle turns over all turns of a step.

    Args:
        stages: p, on as many ranks.
        micro_batches: m, of a step.
        virtual_stages: v, of a rank; 1: not interleaved.
    """
    return (stages - 1) / (virtual_stages * micro_batches + stages - 1)
