"""Two nodes with addresses of their own: DeepSpeed's multi-node launcher with a hostfile."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megasparse.config import dump_yaml, load_config
from tests import forked
from tests.launch.nodes import ROOT, SECONDS, end_all_in, environment, make_nodes, make_ssh, require
from tests.reliability.runs import differences
from tests.runs import TINY, make_dataset


@pytest.fixture(scope="module")
def nodes():
    require("pdsh", "sshd", "ssh")
    with make_nodes(2, "mn") as made:
        yield made


def test_deepspeed_with_a_hostfile_trains_as_on_one_node(nodes, tmp_path):
    flags = [*TINY, "--data-path", make_dataset(tmp_path / "data"), "--run-dir"]
    hosts, carried = tmp_path / "hosts", tmp_path / "env"
    hosts.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
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
        *flags,
        str(tmp_path / "run"),
    ]
    with make_ssh(tmp_path, nodes) as variables:
        done = nodes[0].run(
            command, env={**variables, "DS_ENV_FILE": str(carried)}, cwd=ROOT, timeout=SECONDS
        )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Using IP address of 10.77.0.1" in output, output
    assert "2 ranks meet at 10.77.0.1; the store listens on ('10.77.0.1'" in output, output
    assert forked.run([*flags, str(tmp_path / "one")], 2, tmp_path / "one.log") == [0, 0]
    assert differences(tmp_path / "run", tmp_path / "one") == []


def test_torchrun_and_a_preflight_that_finds_other_data_on_a_node(nodes, tmp_path):
    """Node 2 has the same index, but other tokens: what a copy that went wrong looks like."""
    prefix = make_dataset(tmp_path / "data")
    original = (tmp_path / "data.bin").read_bytes()
    (tmp_path / "other.bin").write_bytes(original[:-2] + b"\x01\x00")
    config = tmp_path / "run.yaml"
    config.write_text(
        dump_yaml(load_config([*TINY, "--data-path", prefix, "--run-dir", str(tmp_path / "run")]))
    )
    started = []
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
        mounts = [f"mount --bind {tmp_path}/other.bin {tmp_path}/data.bin"] if number else []
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
    assert all(process.returncode for process in started), outputs
    assert (
        "preflight: n1 - n2" in outputs[0]
        and "n1: 1 ranks, no GPU, 10.77.0.1 on veth0" in outputs[0]
    )
    for output in outputs:
        found = f"PreflightError: n2: the data's digest of bytes of {prefix}.bin is"
        assert found in output and "copy the data there again" in output, output
