"""Two nodes with addresses of their own: DeepSpeed's multi-node launcher with a hostfile."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import forked
from tests.launch.nodes import ROOT, make_nodes, make_ssh, require
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
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts),
               "launch/pretrain.py", *flags, str(tmp_path / "run")]  # fmt: skip
    with make_ssh(tmp_path, nodes) as variables:
        done = nodes[0].run(
            command, env={**variables, "DS_ENV_FILE": str(carried)}, cwd=ROOT, timeout=120
        )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Using IP address of 10.77.0.1" in output, output
    assert "2 ranks meet at 10.77.0.1; the store listens on ('10.77.0.1'" in output, output
    assert forked.run([*flags, str(tmp_path / "one")], 2, tmp_path / "one.log") == [0, 0]
    assert differences(tmp_path / "run", tmp_path / "one") == []
