"""How fast ranks reduce together: within each host, between neighbouring hosts, and all at once.

Bandwidth is that of nccl-tests ("bus bandwidth"): bytes x 2 (n - 1) / n over the time of an
all-reduce, which does not depend on the number of ranks where links are equal. Each figure is the
best of a few, and links of a kind that share no host run at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megasparse.distributed.control_plane import ControlPlane

BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
REPEATS = 5


@dataclass(frozen=True)
class Link:
    """Ranks that reduce together; links of one phase share no rank."""

    phase: int
    kind: str
    name: str
    hosts: str
    ranks: tuple[int, ...]


def plan(hosts: Sequence[str]) -> list[Link]:
    """The links of a run.

    Args:
        hosts: name by rank.
    """
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    links = [
        Link(0, "host", f"the {len(ranks)} ranks of {host}", host, tuple(ranks))
        for host, ranks in by_host.items()
        if len(ranks) > 1
    ]
    names = list(by_host)
    for number, (one, other) in enumerate(zip(names, names[1:], strict=False)):
        pair = (by_host[one][0], by_host[other][0])
        links.append(Link(1 + number % 2, "network", f"{one} - {other}", f"{one}, {other}", pair))
    if len(names) > 1:
        everyone = tuple(range(len(hosts)))
        links.append(Link(3, "all", f"all {len(hosts)} ranks", "all hosts", everyone))
    return links


def measure_links(
    control: ControlPlane, hosts: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """Bandwidth of every link, on every rank; a collective call.

    Returns:
        kind, name, hosts and gbps (GB/s) of each link.
    """
    links = plan(hosts)
    mine: dict[str, float] = {}
    for phase in range(4):
        groups = [(link, dist.new_group(list(link.ranks))) for link in links if link.phase == phase]
        for link, group in groups:
            if control.rank in link.ranks:
                mine[link.name] = _bandwidth(group, len(link.ranks), device)
        control.barrier()
        for link, group in groups:
            if control.rank in link.ranks:
                dist.destroy_process_group(group)
    answers = control.gather(mine)
    return [
        {
            "kind": link.kind,
            "name": link.name,
            "hosts": link.hosts,
            "gbps": min(answers[rank][link.name] for rank in link.ranks),
        }
        for link in links
    ]


def _bandwidth(group: dist.ProcessGroup, ranks: int, device: torch.device) -> float:
    tensor = torch.zeros(BYTES[device.type], dtype=torch.uint8, device=device).view(torch.float32)
    dist.all_reduce(tensor, group=group)  # connections are made at the first use
    best = float("inf")
    for _ in range(REPEATS):
        _finish(device)
        begin = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _finish(device)
        best = min(best, time.perf_counter() - begin)
    return tensor.nbytes * 2 * (ranks - 1) / ranks / best / 1e9


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_offsets(control: ControlPlane, rounds: int = 5) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's.

    Ranks read their clocks right after an agreement that ends on all within a millisecond or so;
    the smallest of a few differences is the one with the least waiting in it.
    """
    best = [float("inf")] * control.world
    for _ in range(rounds):
        control.barrier()
        times = control.gather(time.time())
        offsets = [moment - times[0] for moment in times]
        best = [min(pair, key=abs) for pair in zip(best, offsets, strict=True)]
    return best
