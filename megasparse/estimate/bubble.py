"""The share of a step in which the stages of a pipeline wait for each other.

With p stages and m micro-batches the schedule 1F1B leaves p - 1 of m + p - 1 turns empty. With v
virtual stages on a rank (interleaved 1F1B; Narayanan et al., SC 2021, section 2.2) a turn is v
times shorter: p - 1 of v m + p - 1.
"""

from __future__ import annotations

from megasparse.config import ResolvedConfig, gradient_accumulation_steps, pipeline_split


def bubble_fraction(stages: int, micro_batches: int, virtual_stages: int = 1) -> float:
    """Idle turns over all turns of a step.

    Args:
        stages: p, on as many ranks.
        micro_batches: m, of a step.
        virtual_stages: v, of a rank; 1: not interleaved.
    """
    return (stages - 1) / (virtual_stages * micro_batches + stages - 1)


def bubble_lines(config: ResolvedConfig, world: int) -> list[str]:
    """The pipeline's bubble, beside those of virtual stages, which DeepSpeed does not have; empty
    without a pipeline."""
    stages = config.parallel.pipeline_model_parallel_size
    if stages == 1:
        return []
    count = gradient_accumulation_steps(config, world)
    layers = min(pipeline_split(config))
    virtual = [v for v in (2, 4, 8) if layers % v == 0]
    shares = [f"1F1B {bubble_fraction(stages, count):.1%}"]
    shares += [f"with {v} virtual stages {bubble_fraction(stages, count, v):.1%}" for v in virtual]
    return ["", f"pipeline bubble   {count} micro-batches: {', '.join(shares)}"]
