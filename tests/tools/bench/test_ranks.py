"""The control side at 8 and at 32 ranks grows no faster than stated; growth laws are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megasparse.distributed import descriptors
from tools.bench.growth import law, report

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[int, dict]:
    output = tmp_path_factory.mktemp("ranks") / "ranks.json"
    command = [sys.executable, "-m", "tools.bench.ranks", "--ranks", "8", "32"]
    subprocess.run([*command, "--output", str(output)], check=True, cwd=ROOT, timeout=240)
    return {int(n): found for n, found in json.loads(output.read_text())["ranks"].items()}


def test_open_files_are_those_of_a_tree_and_one_store(measured):
    for world, phases in measured.items():
        found = phases["load"]
        assert found["files_rank_0"] <= min(2 * world + 50, descriptors.needed(0, world))
        assert found["files_rank_1"] <= 30 + 2 * world.bit_length()
    grown = measured[32]["load"]["files_rank_1"] - measured[8]["load"]["files_rank_1"]
    assert grown <= 6  # a full mesh would add 24 in each of two groups


def test_each_file_is_opened_once(measured):
    for world, phases in measured.items():
        assert phases["choose"]["opened"] == world
        opened = (phases[phase]["opened"] for phase in ("choose", "load", "reshard"))
        assert sum(opened) <= 2 * world


def test_traffic_grows_with_the_ranks_and_not_with_their_square(measured):
    if "packets" not in measured[8]["save"] and os.geteuid():
        pytest.skip("counting packets needs a network namespace, which needs root")
    for phase in ("control", "agree", "save", "choose", "load", "reshard", "watch", "beat"):
        few, many = (measured[n][phase] for n in (8, 32))
        # In log N rounds with log N neighbours; a set-up goes through the leaders of hosts, which
        # 8 ranks do without (a mesh would take 16 times as much, not 8).
        bounds = {"reshard": (2.5, 300), "watch": (2.0, 80)}
        growth, each = bounds.get(phase, (1.5, 60))
        assert many["packets"] <= growth * 4 * few["packets"], phase
        assert many["packets"] <= each * 32, phase
        if phase != "choose":  # there every rank gets the manifest, a line for each rank
            assert many["bytes"] <= max(growth, 1.6) * 4 * few["bytes"], phase
    assert measured[32]["save"]["manifest_bytes"] <= 160 * 32 + 500


def test_one_supervisor_of_a_host_looks_at_shared_files(measured):
    for world, phases in measured.items():
        found = phases["restart"]
        # Each looks once when it begins; after that one of each host, once a second.
        assert found["opened"] <= world + 4 * world / 8 * (found["seconds"] + 2), world


def test_a_law_is_found_and_reported():
    points = {n: 3.0 * n**1.5 for n in (8, 32, 64, 128)}
    factor, power = law({**points, 8: 1e9}) or (0.0, 0.0)
    assert (factor, power) == (pytest.approx(3.0), pytest.approx(1.5))
    assert law({64: 0.0, 128: 0.0}) is None
    run = {"commit": "c", "date": "d", "hardware": "h", "torch": "t", "python": "p", "ranks": {}}
    for n, value in points.items():
        phases = ("meet", "control", "agree", "save", "choose", "load")
        run["ranks"][str(n)] = {phase: {"cpu_seconds": value} for phase in phases}
    since = {n: {**phases, "beat": {"packets": 2.0 * int(n)}} for n, phases in run["ranks"].items()}
    text = report(run, {**run, "ranks": since}, "command")
    assert r"| - \| 64 | - \| 128 | - \| 256 | - \| 1.00 | - \| 32.8 k |" in text
    assert r"1.50 \| 1.50" in text and "6.29 M" in text and "**extrapolated**" in text
