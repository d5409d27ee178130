"""Are the hosts of a run fit for it? Asked before anything is built, and by itself:

    python -m megasparse.train.preflight CONFIG [FLAGS]

under the launcher that starts the run (`deepspeed --hostfile hosts --module
megasparse.train.preflight CONFIG`, `srun`, `torchrun -m ...`), or alone for this host. A run does
the fast part at its start (`--preflight off|fast|full`). Exit code 77 when something would end or
spoil the run; each failure names the host and what to do.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from megasparse import log
from megasparse.config import RunConfig, load_config, padded_vocab_size, resolve
from megasparse.errors import MegasparseError, PreflightError
from megasparse.log import logger
from megasparse.train import host_rules, hosts
from megasparse.train.control import Control, make_control
from megasparse.train.footprint import footprint, stage_weights
from megasparse.train.host_rules import GIB, Finding
from megasparse.train.links import clock_offsets, measure_links
from megasparse.train.precheck import recipe_of
from megasparse.train.rendezvous import join_group, leave_group, own_device
from megasparse.train.sources import CheckedData, check_data

CHECKPOINT_BYTES = 12  # a parameter: float32 weight and two moments


def check_hosts(
    config: RunConfig,
    data: CheckedData | None,
    control: Control,
    full: bool,
    error: MegasparseError | None = None,
) -> list[Finding]:
    """Facts of all ranks and what is wrong with them, on every rank; a collective call.

    Args:
        config: resolved.
        data: checked by this rank.
        error: why this rank has no data.
    """
    if error is not None:
        mine = hosts.failed(error)
    else:
        mine = hosts.facts(config, data, full)
        mine["wanted"] = _wanted(config, data, control)
    offsets = clock_offsets(control)
    ranks = [
        {**facts, "clock": offset}
        for facts, offset in zip(control.gather(mine), offsets, strict=True)
    ]
    findings = host_rules.judge(ranks, _checkpoint_bytes(config, data))
    _describe(ranks, full)
    if full and control.world > 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        links = measure_links(control, [facts["host"] for facts in ranks], device)
        for link in links:
            logger.info("preflight: %-28s %8.2f GB/s", link["name"], link["gbps"])
        findings += host_rules.judge_links(links, config.parallel.preflight_min_bandwidth)
    return findings


def require_fit(findings: Sequence[Finding]) -> None:
    """Say what was found.

    Raises:
        PreflightError: there are failures; its line has the first.
    """
    for finding in findings:
        if not finding.failure:
            log.log_once("preflight: %s", finding)
    failures = [finding for finding in findings if finding.failure]
    for finding in failures[1:]:
        logger.info("preflight failed: %s", finding)
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise PreflightError(f"{failures[0]}{more}")


def _wanted(config: RunConfig, data: CheckedData | None, control: Control) -> dict[str, int]:
    """Bytes of this rank, by the estimate."""
    stages = config.parallel.pipeline_model_parallel_size
    world = max(control.world, stages * config.parallel.tensor_model_parallel_size)
    stage = control.rank * stages // world
    need = footprint(
        config, recipe_of(config), _vocabulary(config, data), world, stage,
        gpu=torch.cuda.is_available(),
    )  # fmt: skip
    return {"state": need.state_bytes, "peak": need.peak_bytes}


def _checkpoint_bytes(config: RunConfig, data: CheckedData | None) -> int:
    recipe, vocabulary = recipe_of(config), _vocabulary(config, data)
    stages = config.parallel.pipeline_model_parallel_size
    shards = (w for s in range(stages) for w in stage_weights(config, recipe, vocabulary, s))
    tp = config.parallel.tensor_model_parallel_size
    return CHECKPOINT_BYTES * tp * sum(w.numel for w in shards if len(w.shape) > 1)


def _vocabulary(config: RunConfig, data: CheckedData | None) -> int:
    size = data.vocab_size if data is not None else config.model.vocab_size
    return padded_vocab_size(size or 1, config)


def _describe(ranks: Sequence[dict[str, Any]], full: bool) -> None:
    """A line a host (in a full preflight): where it is, what it has."""
    seen = set()
    for facts in ranks if full else ():
        if facts["host"] in seen or "error" in facts:
            continue
        seen.add(facts["host"])
        here = sum(other["host"] == facts["host"] for other in ranks)
        gpu = facts["gpu"]["name"] if facts["gpu"] else "no GPU"
        logger.info(
            "preflight: %s: %d ranks, %s, %s on %s, %.1f GiB memory, %.1f GiB disk, clock %+.3f s; "
            "a rank's state %.2f GiB, peak about %.2f GiB",
            facts["host"], here, gpu, facts["address"], facts["interface"],
            facts["memory"] / GIB, facts["disk"]["free"] / GIB, facts["clock"],
            facts["wanted"]["state"] / GIB, facts["wanted"]["peak"] / GIB,
        )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """The command; its exit code."""
    arguments = [a for a in argv if not a.startswith(("--local_rank", "--local-rank"))]
    log.setup(int(os.environ.get("RANK", "0")))
    if not arguments or arguments[0] in ("-h", "--help"):
        logger.info("%s", __doc__)
        return 0 if arguments else 64
    try:
        loaded = load_config(["--config", *arguments])
        parallel = loaded.parallel
        alone = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        world = int(os.environ.get("WORLD_SIZE", alone))
        config = resolve(loaded, world)
        data, error = None, None
        try:
            data = check_data(config)
        except MegasparseError as problem:
            error = problem
        timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
        join_group(own_device(), timeout)
        control = make_control()
        if control.world < world:
            logger.info("preflight: this host alone; start it like the run to check all")
        findings = check_hosts(config, data, control, full=True, error=error)
        control.agree([0])
        require_fit(findings)
        leave_group()
    except MegasparseError as problem:
        logger.error("%s: %s", type(problem).__name__, problem)
        return problem.exit_code
    logger.info("preflight: %d ranks are fit for the run", control.world)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
