"""The text of `tools/estimate.py --goodput`: simulated goodput of a layout, and what to set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasparse.cli import markdown_table
from megasparse.errors import ConfigError
from megasparse.estimate.goodput import HOUR, advised, exact, with_spares
from megasparse.estimate.run_costs import Rates, checkpoint_bytes, costs_of
from tools.bench.growth import law

SPARES = (0, 1, 2, 4, 8)
CONTROL = Path(__file__).parents[1] / "results" / "ranks-cpu-after.json"
_SETUP = ("meet", "control", "choose", "load")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What the estimate of goodput assumes."""
    group = parser.add_argument_group("goodput (simulated)")
    group.add_argument(
        "--goodput",
        type=int,
        nargs="*",
        metavar="GPUS",
        help="of runs on so many (--gpus)",
    )
    group.add_argument("--failures-a-day", type=float, default=0.4736, help="per 1,000 GPUs")
    group.add_argument("--storage-gbps", type=float, default=200.0, help="GB/s of the file system")
    group.add_argument("--host-gbps", type=float, default=10.0, help="GB/s of a host to it")
    group.add_argument("--copy-gbps", type=float, default=10.0, help="GB/s of a GPU to its host")
    group.add_argument("--start-seconds", type=float, default=60.0, help="until the first step")
    group.add_argument("--repair-hours", type=float, default=24.0, help="of a host that failed")
    group.add_argument("--days", type=float, default=54.0, help="that are simulated")
    group.add_argument("--control", type=Path, default=CONTROL, help="of tools.bench.ranks")


def rates_of(args: argparse.Namespace) -> Rates:
    """The rates, those of the control side from the measurement.

    Raises:
        ConfigError: the file is none of `tools.bench.ranks`.
    """
    try:
        measured = json.loads(args.control.read_text())
        ranks = {int(n): phases for n, phases in measured["ranks"].items()}
        setup, publish = (
            law({n: sum(p[name]["cpu_seconds_rank_0"] for name in names) for n, p in ranks.items()})
            for names in (_SETUP, ("save",))
        )
        assert setup is not None and publish is not None
        sha256 = float(measured["sha256_gbps"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"--control {args.control}: no file of tools.bench.ranks: {error!r}"
        ) from None
    return Rates(
        args.storage_gbps,
        args.host_gbps,
        args.copy_gbps,
        sha256,
        args.start_seconds,
        setup,
        publish,
    )


def page(text: str, command: str, layout: str) -> str:
    """The table as a result's page."""
    return f"# Goodput at many ranks (simulated)\n\n`{command}`\n\n{layout}. {text}\n"


def table(found: Sequence[Any], args: argparse.Namespace) -> str:
    """A table of estimates of one run on several numbers of GPUs.

    Args:
        found: estimates of `tools/estimate.py`.
    """
    rates = rates_of(args)
    rows = []
    for estimate in found:
        for background in (False, True):
            rows.append(_row(estimate, background, rates, args))
    head = [
        "GPUs",
        "save",
        "failure every",
        "training stands",
        "published after",
        "restart",
        "--save-interval",
        "minutes",
        "goodput",
        "formula",
    ]
    head += [f"{n} in reserve" for n in SPARES]
    return "\n".join(
        [
            f"Simulated: {args.days:g} days, 20 runs each, {args.failures_a_day:g} failures a day "
            f"for 1,000 GPUs (Llama 3's log: 0.47), {args.storage_gbps:g} GB/s of the file system, "
            f"{args.host_gbps:g} of a host, {args.start_seconds:g} s until the first step, "
            f"{args.repair_hours:g} h for a repair. The control side by {args.control.name}.",
            "Goodput is with endless hosts in reserve, then with so many; formula is Daly's, "
            "without publication in the background.",
            "",
            *markdown_table(head, rows),
        ]
    )


def _row(estimate: Any, background: bool, rates: Rates, args: argparse.Namespace) -> list[str]:
    config, gpus = estimate.config, estimate.world
    tp = config.parallel.tensor_model_parallel_size
    size = checkpoint_bytes(
        tp * sum(stage.parameters for stage in estimate.stages),
        tp * sum(stage.sparse_parameters for stage in estimate.stages),
        config.train.bf16,
        config.parallel.zero_stage,
    )
    costs = costs_of(
        size,
        gpus,
        args.gpus_per_node,
        rates,
        background,
        args.failures_a_day,
        repair=args.repair_hours * HOUR,
    )
    step = estimate.time.seconds if estimate.time is not None else 1.0
    days = args.days * 24 * HOUR
    steps, goodput = advised(costs, days, step)
    interval = steps * step
    spares = [advised(with_spares(costs, n), days, step)[1].share for n in SPARES]
    return [
        f"{gpus:,}",
        "background" if background else "in line",
        f"{costs.mtbf / HOUR:.1f} h",
        f"{costs.save:.2f} s",
        f"{costs.publish:.0f} s" if background else "at once",
        f"{costs.restart:.0f} s",
        f"{steps}",
        f"{interval / 60:.1f}",
        f"{goodput.share:.4f}",
        f"{exact(costs, interval):.4f}",
        *(f"{share:.4f}" for share in spares),
    ]
