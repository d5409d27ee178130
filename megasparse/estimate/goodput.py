"""Goodput: the share of its time that a long run spends on steps that count.

Failures come at random, at a constant rate for each GPU. Each takes the work since the last
published checkpoint, and the time to notice it and to start again. Saving often costs time too, so
there is a best interval (Young, 1974; Daly, 2006). `exact` is Daly's formula for exponential
failures, which may strike during saves and restarts as well; `simulate` plays runs failure by
failure, with hosts in reserve and publication in the background, for which there is no formula.

All times are in seconds. Nothing here is measured: what comes in may be.

    python -m megasparse.estimate.goodput --gpus 1024 16384 --save-seconds 10 --restart-seconds 70

`tools/estimate.py --goodput` does the same for a model and a layout, with times of saves and
restarts from its checkpoint's size and from measured files.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megasparse.cli import guarded, markdown_table
from megasparse.errors import ConfigError

HOUR = 3600.0
IDLE = 5.0
# Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 GPUs (its paper, section 3.3.4).
LLAMA3_FAILURES_A_DAY_PER_1000 = 419 / 54 / 16.384


@dataclass(frozen=True)
class Costs:
    """What a run loses, and when.

    Attributes:
        mtbf: mean time between failures of the whole run.
        save: time that training stands still for a save.
        publish: from the end of that until the checkpoint counts; training goes on meanwhile.
        restart: start of the processes, set-up, verification and load.
        notice: from a failure until the ranks have ended.
        spare_hosts: hosts in reserve; without a free one a run waits for a repair.
        repair: until a failed host is back.
    """

    mtbf: float
    save: float
    publish: float = 0.0
    restart: float = 0.0
    notice: float = 0.0
    spare_hosts: int | None = None
    repair: float = 0.0


@dataclass(frozen=True)
class Goodput:
    """Of simulated runs: mean share of useful time, its standard error, failures a run."""

    share: float
    error: float
    failures: float


def mtbf_of(gpus: int, failures_a_day_per_1000: float = LLAMA3_FAILURES_A_DAY_PER_1000) -> float:
    """Mean time between failures of a run."""
    return 24 * HOUR / (failures_a_day_per_1000 * gpus / 1000)


def exact(costs: Costs, interval: float) -> float:
    """Goodput by Daly's formula, with endless hosts in reserve and publication at once.

    A cycle of `interval + save` takes `M exp(R/M) (exp((interval + save)/M) - 1)` on average; of
    that a failure's notice is no part, in which nothing can fail.

    Args:
        interval: useful time from one save to the next.
    """
    mtbf = costs.mtbf
    exposed = mtbf * math.exp(costs.restart / mtbf) * math.expm1((interval + costs.save) / mtbf)
    return interval / (exposed * (1 + costs.notice / mtbf))


def young(costs: Costs) -> float:
    """Young's interval, for saves that are short against the time between failures."""
    return math.sqrt(2 * costs.save * costs.mtbf)


def daly(costs: Costs) -> float:
    """Daly's interval, of higher order."""
    save, mtbf = costs.save, costs.mtbf
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def best_interval(costs: Costs) -> float:
    """The useful time between saves with the highest `exact` goodput.

    It solves `exp((t + save) / M) (1 - t / M) = 1`. Where saves cost training next to nothing it is
    at least `IDLE` times `publish`, so that the file system is not busy all the time.
    """
    low, high = 0.0, costs.mtbf
    for _ in range(100):
        middle = (low + high) / 2
        rising = math.exp((middle + costs.save) / costs.mtbf) * (1 - middle / costs.mtbf) > 1
        low, high = (middle, high) if rising else (low, middle)
    return max(low, IDLE * costs.publish)


def simulate(
    costs: Costs, interval: float, duration: float, runs: int = 20, seed: int = 0
) -> Goodput:
    """Play runs, failure by failure.

    Args:
        interval: useful time from one save to the next.
        duration: of each run.
        runs: to average over.
    """
    shares, failures = [], 0
    for run in range(runs):
        share, failed = _play(costs, interval, duration, random.Random(f"{seed}/{run}"))
        shares.append(share)
        failures += failed
    error = statistics.stdev(shares) / math.sqrt(runs) if runs > 1 else math.inf
    return Goodput(statistics.fmean(shares), error, failures / runs)


def _play(
    costs: Costs, interval: float, duration: float, draws: random.Random
) -> tuple[float, int]:
    """Useful share and failures of one run."""
    cycle = interval + costs.save
    time = useful = 0.0
    failures = 0
    in_repair: list[float] = []  # times at which hosts come back
    while time < duration:
        lived = draws.expovariate(1 / costs.mtbf)
        training = lived - costs.restart
        ends = time + lived >= duration
        if ends:
            training = duration - time - costs.restart
        # A save that was published counts; at the end of the run its last steps count as well.
        published = max(0, math.floor((training - costs.publish) / cycle))
        useful += published * interval
        if ends:
            useful += max(0.0, min(training - published * cycle, interval))
            break
        failures += 1
        time += lived + costs.notice
        time = _wait_for_host(costs, in_repair, time)
    return useful / duration, failures


def _wait_for_host(costs: Costs, in_repair: list[float], time: float) -> float:
    """When the run has all its hosts again, after one has failed."""
    if costs.spare_hosts is None:
        return time
    while in_repair and in_repair[0] <= time:
        heapq.heappop(in_repair)
    heapq.heappush(in_repair, time + costs.repair)
    if len(in_repair) > costs.spare_hosts:
        return heapq.heappop(in_repair)
    return time


def advised(costs: Costs, duration: float, step_time: float, runs: int = 20) -> tuple[int, Goodput]:
    """The interval between saves, in steps, and the goodput of runs with it."""
    steps = max(1, round(best_interval(costs) / step_time))
    return steps, simulate(costs, steps * step_time, duration, runs)


def with_spares(costs: Costs, spare_hosts: int | None) -> Costs:
    """The same run with another number of hosts in reserve; None: endless."""
    return replace(costs, spare_hosts=spare_hosts)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Simulated goodput of long runs, and the interval between saves."
    )
    parser.add_argument("--gpus", type=int, nargs="+", required=True)
    parser.add_argument(
        "--failures-a-day",
        type=float,
        default=LLAMA3_FAILURES_A_DAY_PER_1000,
        help="for 1,000 GPUs (default: Llama 3's log, %(default).4f)",
    )
    parser.add_argument("--save-seconds", type=float, required=True, help="training stands still")
    parser.add_argument("--publish-seconds", type=float, default=0.0, help="after that (async)")
    parser.add_argument("--restart-seconds", type=float, required=True, help="to the first step")
    parser.add_argument("--notice-seconds", type=float, default=12.0, help="of a failure")
    parser.add_argument("--spare-hosts", type=int, help="in reserve (default: endless)")
    parser.add_argument("--repair-hours", type=float, default=24.0, help="of a host that failed")
    parser.add_argument("--step-seconds", type=float, help="for the interval in steps")
    parser.add_argument("--days", type=float, default=54.0, help="that are simulated")
    args = parser.parse_args(argv)
    positive = ("failures_a_day", "save_seconds", "step_seconds", "days")
    for name, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        least = " above" if name in positive or name == "gpus" else " of at least"
        for number in numbers:
            if number is not None and (number < 0 or (number == 0 and least == " above")):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: found {number:g}, expected a number{least} 0")
    return args


def _report(argv: Sequence[str]) -> None:
    args = _parse(argv)
    rows = []
    for gpus in args.gpus:
        costs = Costs(
            mtbf_of(gpus, args.failures_a_day),
            args.save_seconds,
            args.publish_seconds,
            args.restart_seconds,
            args.notice_seconds,
            args.spare_hosts,
            args.repair_hours * HOUR,
        )
        step = args.step_seconds or 1.0
        steps, goodput = advised(costs, args.days * 24 * HOUR, step)
        row = [f"{gpus:,}", f"{costs.mtbf / HOUR:.1f} h", f"{young(costs):.0f} s"]
        row += [f"{daly(costs):.0f} s", f"{steps * step:.0f} s"]
        row += [f"{steps}"] if args.step_seconds else []
        rows.append([*row, f"{goodput.share:.4f}", f"{exact(costs, steps * step):.4f}"])
    head = ["GPUs", "failure every", "Young", "Daly", "best interval"]
    head += ["--save-interval"] if args.step_seconds else []
    table = markdown_table([*head, "goodput", "formula"], rows)
    told = (
        f"Simulated: {args.days:g} days, 20 runs each. Formula: Daly's, with endless hosts in "
        "reserve and publication at once."
    )
    sys.stdout.write("\n".join([told, "", *table, ""]))


def main(argv: Sequence[str]) -> int:
    """The command; its exit code."""
    return guarded("goodput", lambda: _report(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
