"""Are the hosts of a run fit for it? Facts of all ranks, judged before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megasparse import log
from megasparse.config import ResolvedConfig, padded_vocab_size, smallest_world
from megasparse.data.check import CheckedData
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import MegasparseError, PreflightError
from megasparse.estimate.memory import footprint, stage_weights
from megasparse.log import logger
from megasparse.preflight import facts as host_facts
from megasparse.preflight import rules
from megasparse.preflight.bandwidth import clock_offsets, measure_links
from megasparse.preflight.rules import GIB, Finding
from megasparse.sparsity.run_recipe import recipe_of

CHECKPOINT_BYTES = 12  # a parameter: float32 weight and two moments


def check_hosts(
    config: ResolvedConfig,
    data: CheckedData | None,
    control: ControlPlane,
    full: bool,
    error: MegasparseError | None = None,
) -> list[Finding]:
    """Facts of all ranks and what is wrong with them, on every rank; a collective call.

    Args:
        config: of the run.
        data: checked by this rank.
        error: why this rank has no data.
    """
    if error is not None:
        mine = host_facts.failed(error)
    else:
        mine = host_facts.facts(config, data, full)
        mine["wanted"] = _wanted(config, data, control)
    offsets = clock_offsets(control)
    ranks = [
        {**facts, "clock": offset}
        for facts, offset in zip(control.gather(mine), offsets, strict=True)
    ]
    findings = rules.judge(ranks, _checkpoint_bytes(config, data))
    _describe(ranks, full)
    if full and control.world > 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        links = measure_links(control, [facts["host"] for facts in ranks], device)
        for link in links:
            logger.info("preflight: %-28s %8.2f GB/s", link["name"], link["gbps"])
        findings += rules.judge_links(links, config.parallel.preflight_min_bandwidth)
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


def _wanted(
    config: ResolvedConfig, data: CheckedData | None, control: ControlPlane
) -> dict[str, int]:
    """Bytes of this rank, by the estimate."""
    stages = config.parallel.pipeline_model_parallel_size
    world = max(control.world, smallest_world(config))
    stage = control.rank * stages // world
    need = footprint(
        config,
        recipe_of(config),
        _vocabulary(config, data),
        world,
        stage,
        gpu=torch.cuda.is_available(),
    )
    return {"state": need.state_bytes, "peak": need.peak_bytes}


def _checkpoint_bytes(config: ResolvedConfig, data: CheckedData | None) -> int:
    recipe, vocabulary = recipe_of(config), _vocabulary(config, data)
    stages = config.parallel.pipeline_model_parallel_size
    shards = (w for s in range(stages) for w in stage_weights(config, recipe, vocabulary, s))
    tp, ep = (
        config.parallel.tensor_model_parallel_size,
        config.parallel.expert_model_parallel_size,
    )
    matrices = (w.numel * (ep if w.divided else 1) for w in shards if len(w.shape) > 1)
    return CHECKPOINT_BYTES * tp * sum(matrices)


def _vocabulary(config: ResolvedConfig, data: CheckedData | None) -> int:
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
            facts["host"],
            here,
            gpu,
            facts["address"],
            facts["interface"],
            facts["memory"] / GIB,
            facts["disk"]["free"] / GIB,
            facts["clock"],
            facts["wanted"]["state"] / GIB,
            facts["wanted"]["peak"] / GIB,
        )
