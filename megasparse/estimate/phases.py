"""A run as a schedule of phases: the time of a step in each of them, and of a mean step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megasparse.config import ResolvedConfig
from megasparse.estimate.time import GemmTable, StepTime, step_time
from megasparse.sparsity.phases import summary
from megasparse.sparsity.recipe import SparsityRecipe


@dataclass(frozen=True)
class PhaseTime:
    """One phase.

    Attributes:
        share: of the run's steps.
        what: it does, in words.
        time: of a step in it.
    """

    share: float
    what: str
    time: StepTime


def phase_times(
    config: ResolvedConfig,
    recipe: SparsityRecipe,
    vocabulary: int,
    world: int,
    table: GemmTable,
    gpus_per_node: int = 8,
) -> list[PhaseTime]:
    """Of all phases of a run, in order (see `step_time`)."""
    return [
        PhaseTime(
            float(phase.share),
            summary(phase.recipe),
            step_time(config, phase.recipe, vocabulary, world, table, gpus_per_node),
        )
        for phase in recipe.phases
    ]


def mean_seconds(phases: Sequence[PhaseTime]) -> float:
    """Of a step, on average over the run."""
    return sum(phase.share * phase.time.seconds for phase in phases)


def describe(phases: Sequence[PhaseTime], tokens: int) -> list[str]:
    """A line a phase and one of the whole run; empty where a run has one phase.

    Args:
        tokens: of a step.
    """
    if len(phases) < 2:
        return []
    lines = ["", "phases"]
    for phase in phases:
        seconds = phase.time.seconds
        lines.append(f"  {phase.share:>7.1%} of the steps {seconds:>8.3f} s  {phase.what}")
    mean = mean_seconds(phases)
    return [*lines, f"  a mean step          {mean:>8.3f} s, {tokens / mean:,.0f} tokens/s"]
