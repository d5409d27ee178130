"""The rule of `search_decay.py`: from flip rates to a decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megasparse.errors import MegasparseError

# mu of a feasible decay (FST, Hu et al., ICML 2024).
FEASIBLE = (0.60, 0.95)


@dataclass(frozen=True)
class Run:
    """A finished short run.

    decay: None for the dense one. curve: (step, flip rate) at each mask refresh but the first. A
    run that ended with a NaN or an infinity has `diverged` set and may lack the rest.
    """

    name: str
    decay: float | None
    curve: tuple[tuple[int, float], ...]
    loss: float | None
    diverged: bool = False

    @property
    def flip_rate(self) -> float:
        return self.curve[-1][1]


@dataclass(frozen=True)
class Candidate:
    """A decay with its flip rate relative to the dense run's, and what that means."""

    decay: float
    flip_rate: float | None
    mu: float | None
    loss: float | None
    verdict: str


def judge(dense: Run, runs: Sequence[Run]) -> list[Candidate]:
    """The candidates in ascending order of their decay.

    Raises MegasparseError when the dense run's flip rate is zero.
    """
    if dense.flip_rate == 0:
        raise MegasparseError(
            f"the dense run flipped nothing at step {dense.curve[-1][0]}, expected a flip rate "
            "above 0; search over more --steps or nearer the peak learning rate"
        )
    candidates = []
    for run in sorted(runs, key=lambda run: run.decay or 0.0):
        assert run.decay is not None
        if run.diverged:
            candidates.append(Candidate(run.decay, None, None, None, "diverged"))
            continue
        mu = run.flip_rate / dense.flip_rate
        verdict = "feasible"
        if mu > FEASIBLE[1]:
            verdict = "too small: flips as in dense training"
        elif mu < FEASIBLE[0]:
            verdict = "too large: masks are frozen"
        candidates.append(Candidate(run.decay, run.flip_rate, mu, run.loss, verdict))
    return candidates


def choose(candidates: Sequence[Candidate]) -> tuple[float | None, str]:
    """The decay to take, or None, and why. Of two equally near the middle the smaller decay."""
    low, high = FEASIBLE
    feasible = [c for c in candidates if c.verdict == "feasible"]
    if feasible:
        best = min(
            feasible, key=lambda c: (round(abs((c.mu or 0.0) - (low + high) / 2), 9), c.decay)
        )
        return best.decay, (
            f"{best.decay:g}: mu {best.mu:.3f} is the nearest to the middle of [{low:.2f}, "
            f"{high:.2f}] of {len(feasible)} feasible decay{'s' if len(feasible) > 1 else ''}"
        )
    measured = [c for c in candidates if c.mu is not None]
    small = [c.decay for c in measured if (c.mu or 0.0) > high]
    large = [c.decay for c in measured if (c.mu or 0.0) < low]
    if small and large and max(small) < min(large):
        hint = f"refine the grid between {max(small):g} and {min(large):g}"
    elif small and not large:
        hint = f"all are too small, try decays above {max(small):g}"
    elif large and not small:
        hint = f"all are too large, try decays below {min(large):g}"
    elif not measured:
        hint = "every run diverged; lower the learning rate or the decays"
    else:
        hint = "mu does not fall with the decay; measure later, with more --steps"
    return None, f"no decay of the grid is feasible: {hint}"


def table(dense: Run, candidates: Sequence[Candidate], choice: float | None) -> str:
    """A line a run: decay, flip rate, mu, loss, verdict."""
    lines = [f"{'decay':>10}  {'flip rate':>9}  {'mu':>6}  {'loss':>8}  verdict"]

    def line(name: str, flips: float | None, mu: float | None, loss: float | None, say: str) -> str:
        shown = [
            "-" if value is None else format(value, form)
            for value, form in ((flips, ".5f"), (mu, ".3f"), (loss, ".4f"))
        ]
        return f"{name:>10}  {shown[0]:>9}  {shown[1]:>6}  {shown[2]:>8}  {say}".rstrip()

    lines.append(line("dense", dense.flip_rate, 1.0, dense.loss, ""))
    for c in candidates:
        verdict = f"{c.verdict}, taken" if c.decay == choice else c.verdict
        lines.append(line(f"{c.decay:g}", c.flip_rate, c.mu, c.loss, verdict))
    return "\n".join(lines)
