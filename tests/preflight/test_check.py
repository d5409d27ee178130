"""Rules about hosts on made-up facts, one wrong thing at a time; links; the command."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megasparse.preflight import facts
from megasparse.preflight.bandwidth import plan
from megasparse.preflight.rules import GIB, judge, judge_links
from tests import dist

GPU = {"name": "H200", "memory": 139 * GIB, "free": 138 * GIB, "capability": "9.0", "problems": []}
WELL: dict[str, Any] = {
    "host": "n1", "local_rank": 0, "versions": {"torch": "2.11.0", "deepspeed": "0.19.8"},
    "source": "abc", "gpu": GPU, "memory": 100 * GIB, "disk": {"path": "/runs", "free": 100 * GIB},
    "data": {"all.a": "1234"}, "clock": 0.001, "wanted": {"state": 50 * GIB, "peak": 90 * GIB},
}  # fmt: skip


def _ranks(**changes: Any) -> list[dict[str, Any]]:
    """Three hosts, of which n2 has the changes."""
    ranks = [{**copy.deepcopy(WELL), "host": f"n{i}"} for i in (1, 2, 3)]
    ranks[1].update(changes)
    return ranks


def test_hosts_that_are_well():
    assert judge(_ranks(), 10 * GIB) == []


@pytest.mark.parametrize(
    ("changes", "failure", "words"),
    [
        ({"versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}}, True,
         "torch is 2.13.0, 2.11.0 on n1; install the same version"),
        ({"versions": {"torch": "2.11.0"}}, True, "deepspeed is none, 0.19.8 on n1"),
        ({"source": "xyz"}, True, "source is xyz, abc on n1; check out the same commit"),
        ({"gpu": {**GPU, "name": "H100"}}, True, "the GPU is H100"),
        ({"gpu": None}, True, "the GPU is none, H200 (139 GiB"),
        ({"gpu": {**GPU, "problems": ["uncorrected memory errors (3)"]}}, True,
         "GPU 0: uncorrected memory errors (3); drain the node"),
        ({"data": {"all.a": "9999"}}, True, "digest of all.a is 9999, 1234 on n1; copy the data"),
        ({"data": {}}, True, "digest of all.a is missing"),
        ({"error": "DataError: a.bin: no such file"}, True, "DataError: a.bin: no such file"),
        ({"clock": -5.0}, False, "5.0 s behind rank 0's; start chrony"),
        ({"clock": 90.0}, True, "90.0 s ahead of rank 0's"),
        ({"wanted": {"state": 150 * GIB, "peak": 200 * GIB}}, True,
         "parameters and optimizer take 150.0 GiB, 139.0 GiB are there"),
        ({"wanted": {"state": 90 * GIB, "peak": 200 * GIB}}, False, "peak is estimated at 200.0"),
        ({"disk": {"path": "/runs", "free": 5 * GIB}}, True, "/runs has 5.00 GiB free"),
        ({"descriptors": 200}, True, "rank 1 may have 200 open files, expected at least 272"),
        ({"disk": {"path": "/runs", "free": 15 * GIB}}, False, "make room or choose another"),
    ],
)  # fmt: skip
def test_one_wrong_host_is_named(changes, failure, words):
    (finding,) = judge(_ranks(**changes), 10 * GIB)
    assert finding.host == "n2" and finding.failure == failure
    assert words in str(finding), finding


def test_host_memory_is_shared_by_its_ranks():
    ranks = [{**copy.deepcopy(WELL), "gpu": None} for _ in range(4)]  # 4 x 50 GiB of 100
    (finding,) = judge(ranks, GIB)
    assert finding.failure and "25.0 GiB are there" in str(finding)


def test_links_are_hosts_pairs_and_all():
    links = plan(["a", "a", "b", "b", "c"])
    assert [(link.name, link.ranks) for link in links] == [
        ("the 2 ranks of a", (0, 1)),
        ("the 2 ranks of b", (2, 3)),
        ("a - b", (0, 2)),
        ("b - c", (2, 4)),
        ("all 5 ranks", (0, 1, 2, 3, 4)),
    ]
    for phase in range(4):  # run at the same time: no rank in two of them
        ranks = [rank for link in links if link.phase == phase for rank in link.ranks]
        assert len(ranks) == len(set(ranks))
    assert plan(["a"]) == []


def test_slow_links_are_told_and_fail_only_by_a_limit():
    links = [
        {"kind": "network", "name": f"n{i} - n{i + 1}", "hosts": f"n{i}, n{i + 1}", "gbps": rate}
        for i, rate in enumerate([40.0, 41.0, 10.0, 39.0])
    ]
    (told,) = judge_links(links, 0.0)
    assert not told.failure and told.host == "n2, n3" and "10.00 GB/s, others at 39.50" in str(told)
    (failed,) = judge_links(links, 20.0)
    assert failed.failure and "expected at least 20" in str(failed)


def _real(rank: int, world: int) -> list[Any]:
    import torch

    from megasparse.distributed.control_plane import make_control_plane
    from megasparse.preflight.bandwidth import clock_offsets, measure_links

    control = make_control_plane()
    hosts_of_ranks = ["a", "a", "b"][:world]
    links = measure_links(control, hosts_of_ranks, torch.device("cpu"))
    return [clock_offsets(control), links]


def test_bandwidth_and_clocks_of_real_ranks():
    for offsets, links in dist.run(_real, 2):
        assert offsets[0] == 0.0 and abs(offsets[1]) < 1.0  # one clock
        assert [link["name"] for link in links] == ["the 2 ranks of a"]
        assert links[0]["gbps"] > 0.0


def test_facts_of_this_machine():
    assert facts.versions()["torch"].startswith("2.") and len(facts.source_digest()) == 16
    assert facts.available_memory() > 0
    disk = facts.free_disk(Path("/tmp/not-there/yet"))
    assert disk["path"] == "/tmp" and disk["free"] > 0


def test_the_command_on_this_host(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {num_layers: 2, hidden_size: 64, vocab_size: 128}\ndata: {mock_data: true}\n"
        f"checkpoint: {{run_dir: {tmp_path}/run}}\n"
    )
    command = [sys.executable, "-m", "megasparse.preflight", str(config)]
    done = subprocess.run(
        [*command, "--tensor-model-parallel-size", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "fit for the run" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
