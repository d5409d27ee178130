"""What is wrong with the hosts of a run: facts of all ranks in, findings out. Pure functions.

A failure would end or spoil the run; a warning is for a person to read. Slowness is a warning,
unless a limit was given. Each finding names the host, what was found, and what to do.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megasparse.distributed import descriptors

Facts = dict[str, Any]
GIB = 2**30
SKEW_WARNING, SKEW_FAILURE = 1.0, 60.0  # seconds; folder locks are taken for stale after 120
SLOW = 0.5  # share of the median link's bandwidth


@dataclass(frozen=True)
class Finding:
    """One thing that was found; `host` is "" for what concerns all."""

    failure: bool
    host: str
    message: str

    def __str__(self) -> str:
        return f"{self.host}: {self.message}" if self.host else self.message


def judge(ranks: Sequence[Facts], checkpoint_bytes: int) -> list[Finding]:
    """Everything but the links.

    Args:
        ranks: facts by rank; a rank with "error" has nothing else.
        checkpoint_bytes: of one checkpoint of the run.
    """
    broken = [Finding(True, f["host"], f["error"]) for f in ranks if "error" in f]
    well = [f for f in ranks if "error" not in f]
    findings = _once(broken)
    if not well:
        return findings
    for name in sorted({name for f in well for name in f["versions"]}):
        findings += _alike(
            well,
            name,
            lambda f, n=name: f["versions"].get(n, "none"),  # type: ignore[misc]
            "install the same version on all nodes (pip install -c tools/constraints-*.txt)",
        )
    findings += _alike(
        well,
        "megasparse's source",
        lambda f: f["source"],
        "check out the same commit there, without changes (git status)",
    )
    findings += _alike(
        well, "the GPU", _gpu_name, "leave the node out (--exclude), or use equal nodes alone"
    )
    names = sorted({name for f in well for name in f["data"]})
    for name in names:
        findings += _alike(
            well,
            f"the data's digest of {name}",
            lambda f, n=name: f["data"].get(n, "missing"),  # type: ignore[misc]
            "copy the data there again, or mount the same file system",
        )
    for rank, f in enumerate(ranks):
        limit = f.get("descriptors", -1)
        if 0 <= limit < descriptors.needed(rank, len(ranks)):
            text = descriptors.message(rank, len(ranks), limit)
            findings.append(Finding(True, f["host"], text))
    for f in well:
        findings += [*_gpu_health(f), *_clock(f)]
        findings += [*_memory(f, well), *_disk(f, checkpoint_bytes)]
    return _once(findings)


def judge_links(links: Sequence[dict[str, Any]], least: float) -> list[Finding]:
    """Links that are slower than a limit, or much slower than others of their kind.

    Args:
        links: kind, name, hosts and GB/s each (`links.measure_links`).
        least: GB/s below which a link is a failure; 0: none is.
    """
    findings = []
    for link in links:
        others = [o["gbps"] for o in links if o["kind"] == link["kind"]]
        told = f"all-reduce over {link['name']} runs at {link['gbps']:.2f} GB/s"
        what = "look at its cables and adapters (ibstat, nvidia-smi topo -m), or leave it out"
        if link["gbps"] < least:
            findings.append(
                Finding(True, link["hosts"], f"{told}, expected at least {least:g}; {what}")
            )
        elif len(others) > 2 and link["gbps"] < SLOW * statistics.median(others):
            usual = statistics.median(others)
            findings.append(Finding(False, link["hosts"], f"{told}, others at {usual:.2f}; {what}"))
    return findings


def _alike(
    ranks: Sequence[Facts], what: str, value: Callable[[Facts], Any], remedy: str
) -> list[Finding]:
    """Failures of the ranks that differ from most (of equally many: from the first)."""
    usual = Counter(value(f) for f in ranks).most_common(1)[0][0]
    reference = next(f["host"] for f in ranks if value(f) == usual)
    return [
        Finding(True, f["host"], f"{what} is {value(f)}, {usual} on {reference}; {remedy}")
        for f in ranks
        if value(f) != usual
    ]


def _gpu_name(f: Facts) -> str:
    gpu = f["gpu"]
    if gpu is None:
        return "none"
    return f"{gpu['name']} ({gpu['memory'] / GIB:.0f} GiB, capability {gpu['capability']})"


def _gpu_health(f: Facts) -> list[Finding]:
    return [
        Finding(
            True,
            f["host"],
            f"GPU {f['local_rank']}: {problem}; drain the node and reset or replace the GPU",
        )
        for problem in (f["gpu"] or {}).get("problems", [])
    ]


def _clock(f: Facts) -> list[Finding]:
    offset = f.get("clock", 0.0)
    if abs(offset) < SKEW_WARNING:
        return []
    side = "ahead of" if offset > 0 else "behind"
    message = f"the clock is {abs(offset):.1f} s {side} rank 0's; start chrony or ntpd there"
    return [Finding(abs(offset) >= SKEW_FAILURE, f["host"], message)]


def _memory(f: Facts, ranks: Sequence[Facts]) -> list[Finding]:
    """The rank's state against the GPU, or its share of the host."""
    if "wanted" not in f:
        return []
    state, peak = f["wanted"]["state"], f["wanted"]["peak"]
    if f["gpu"] is not None:
        there, place = f["gpu"]["memory"], f"GPU {f['local_rank']}"
    else:
        sharing = sum(other["host"] == f["host"] for other in ranks)
        there, place = f["memory"] // sharing, f"the host's free memory for each of {sharing} ranks"
    remedy = (
        "more tensor or pipeline parallelism, --zero-stage, --recompute-granularity full or a "
        "smaller micro-batch (tools/estimate.py lists what fits)"
    )
    sizes = f"{there / GIB:.1f} GiB are there ({place}); {remedy}"
    if state > there:
        text = f"a rank's parameters and optimizer take {state / GIB:.1f} GiB, {sizes}"
        return [Finding(True, f["host"], text)]
    if peak > there:
        text = f"a rank's peak is estimated at {peak / GIB:.1f} GiB, {sizes}"
        return [Finding(False, f["host"], text)]
    return []


def _disk(f: Facts, checkpoint_bytes: int) -> list[Finding]:
    free, path = f["disk"]["free"], f["disk"]["path"]
    if free >= 2 * checkpoint_bytes:
        return []
    message = (
        f"{path} has {free / GIB:.2f} GiB free, a checkpoint takes {checkpoint_bytes / GIB:.2f} "
        "and the one before it stays until it is whole; make room or choose another --save"
    )
    return [Finding(free < checkpoint_bytes, f["host"], message)]


def _once(findings: list[Finding]) -> list[Finding]:
    """Without what several ranks of a host say alike; failures first."""
    return sorted(dict.fromkeys(findings), key=lambda finding: not finding.failure)
