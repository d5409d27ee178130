"""The sbatch scripts' container variant: what srun is given, and what of it reaches a rank.

There is no pyxis here. In place of srun stands a script that writes its options down and does to
the environment what pyxis and enroot's hook for PyTorch images do, then runs the command.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> "$WRITTEN/options"; shift; done
export MASTER_ADDR=hook MASTER_PORT=61000 WORLD_SIZE=1 RANK=7 LOCAL_RANK=7 PYTHON=other
exec "$@"
"""
PYTHON = """#!/usr/bin/env bash
echo "$MASTER_ADDR $MASTER_PORT $RANK $LOCAL_RANK $WORLD_SIZE $*" >> "$WRITTEN/ranks"
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script in an allocation of one node; what was written comes back by name."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\n"), ("chosen", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "WRITTEN": str(tmp_path),
        "PYTHON": str(tmp_path / "chosen"),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_CPUS_PER_TASK": "8",
    }

    def submit(script: str, *arguments: str, **variables: str) -> dict[str, list[str]]:
        result = subprocess.run(
            ["bash", f"launch/slurm/{script}", *arguments],
            cwd=ROOT,
            text=True,
            env={**environment, **variables},
            capture_output=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        files = [path for path in (tmp_path / "options", tmp_path / "ranks") if path.exists()]
        return {path.name: path.read_text().splitlines() for path in files}

    return submit


def test_a_run_in_a_container_keeps_its_rendezvous_and_sees_its_folder(run, tmp_path):
    place = tmp_path / "elsewhere"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    flags = ["configs/models/gpt2_124m.yaml", "--run-dir", str(tmp_path / "link")]
    found = run(
        "pretrain.sbatch",
        *flags,
        CONTAINER_IMAGE="/images/a.sqsh",
        CONTAINER_MOUNTS="/d:/d:ro",
        RANKS_PER_NODE="2",
    )
    assert {
        "--container-image=/images/a.sqsh",
        f"--container-workdir={ROOT}",
        f"--container-mounts={ROOT}:{ROOT},{place}:{place},/d:/d:ro",
    } <= set(found["options"])
    script = f"launch/pretrain.py --config {' '.join(flags)} --resume"
    # One node: nothing listens outside of it, whatever the image says.
    assert sorted(found["ranks"]) == [f"127.0.0.1 12017 {n} {n} 2 {script}" for n in (0, 1)]


def test_without_an_image_there_is_no_container(run, tmp_path):
    found = run(
        "pretrain.sbatch", "configs/models/gpt2_124m.yaml", "--run-dir", str(tmp_path / "run")
    )
    assert not [option for option in found["options"] if "container" in option]
    assert len(found["ranks"]) == 1


def test_further_configuration_files_are_flags_and_name_the_run(run):
    files = ["configs/models/gpt2_124m.yaml", "--config", "configs/recipes/fst.yaml"]
    folder = ROOT / "runs" / "gpt2_124m_fst-17"
    try:
        found = run("pretrain.sbatch", *files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    words = f"--config {' '.join(files)} --resume --run-dir runs/gpt2_124m_fst-17"
    assert found["ranks"][0].endswith(words)


def test_a_conversion_in_a_container(run):
    found = run("convert.sbatch", "--help", CONTAINER_IMAGE="/images/a.sqsh")
    assert f"--container-mounts={ROOT}:{ROOT}" in found["options"]
    assert found["ranks"][0].endswith("tools/convert_checkpoint.py --help")
