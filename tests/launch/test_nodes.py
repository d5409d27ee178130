"""Two nodes with addresses of their own: DeepSpeed's multi-node launcher with a hostfile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from megasparse.config import dump_yaml, load_config
from tests import forked
from tests.launch.nodes import ROOT, SECONDS, end_all_in, environment, make_nodes, make_ssh, require
from tests.reliability.runs import differences
from tests.runs import TINY, make_dataset


class Ended(NamedTuple):
    """How a start on two nodes ended: of each command the exit code and the output."""

    folder: Path
    codes: list[int]
    outputs: list[str]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Iterator[dict[Callable, Future[Ended]]]:
    """Both ways to start, side by side, each on two nodes of its own."""
    require("pdsh", "sshd", "ssh")
    with ThreadPoolExecutor() as pool:
        yield {
            start: pool.submit(start, tmp_path_factory.mktemp(start.__name__))
            for start in (_with_a_hostfile, _with_other_data)
        }


def _flags(folder: Path) -> list[str]:
    return [*TINY, "--data-path", str(folder / "data"), "--run-dir"]


def _with_a_hostfile(folder: Path) -> Ended:
    """DeepSpeed's launcher."""
    make_dataset(folder / "data")
    hosts, carried = folder / "hosts", folder / "env"
    carried.write_text(
        subprocess.run(["bash", "launch/env.sh"], cwd=ROOT, capture_output=True, text=True).stdout
        + "DS_ACCELERATOR=cpu\n"
    )
    assert "OMP_NUM_THREADS=" in carried.read_text()
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        str(hosts),
        "launch/pretrain.py",
        *_flags(folder),
        str(folder / "run"),
    ]
    with make_nodes(2, "mn") as nodes, make_ssh(folder, nodes) as variables:
        hosts.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
        done = nodes[0].run(
            command, env={**variables, "DS_ENV_FILE": str(carried)}, cwd=ROOT, timeout=SECONDS
        )
    return Ended(folder, [done.returncode], [done.stdout + done.stderr])


def _with_other_data(folder: Path) -> Ended:
    """torchrun; node 2 has the same index, but other tokens, as of a copy that went wrong."""
    prefix = make_dataset(folder / "data")
    original = (folder / "data.bin").read_bytes()
    (folder / "other.bin").write_bytes(original[:-2] + b"\x01\x00")
    config = folder / "run.yaml"
    config.write_text(
        dump_yaml(load_config([*TINY, "--data-path", prefix, "--run-dir", str(folder / "run")]))
    )
    started = []
    with make_nodes(2, "mo") as nodes:
        for number, node in enumerate(nodes):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--node_rank",
                str(number),
                "--master_addr",
                nodes[0].address,
                "--master_port",
                "29401",
                "-m",
                "megasparse.preflight",
                str(config),
            ]
            mounts = [f"mount --bind {folder}/other.bin {folder}/data.bin"] if number else []
            started.append(
                subprocess.Popen(
                    node.command(command, mounts),
                    env=environment(),
                    cwd=ROOT,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        try:
            outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
        finally:
            for node in nodes:
                end_all_in(node)
    return Ended(folder, [process.returncode for process in started], outputs)


def test_deepspeed_with_a_hostfile_trains_as_on_one_node(ended, tmp_path):
    folder, codes, (output,) = ended[_with_a_hostfile].result()
    assert codes == [0], output
    assert "Using IP address of 10.77.0.1" in output, output
    assert "2 ranks meet at 10.77.0.1; the store listens on ('10.77.0.1'" in output, output
    flags = [*_flags(folder), str(tmp_path / "one")]
    assert forked.run(flags, 2, tmp_path / "one.log") == [0, 0]
    assert differences(folder / "run", tmp_path / "one") == []


def test_torchrun_and_a_preflight_that_finds_other_data_on_a_node(ended):
    folder, codes, outputs = ended[_with_other_data].result()
    assert all(codes), outputs
    assert (
        "preflight: n1 - n2" in outputs[0]
        and "n1: 1 ranks, no GPU, 10.77.0.1 on veth0" in outputs[0]
    )
    for output in outputs:
        found = f"PreflightError: n2: the data's digest of bytes of {folder}/data.bin is"
        assert found in output and "copy the data there again" in output, output
