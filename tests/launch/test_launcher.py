"""The real launchers: DeepSpeed's and torch's, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.dist import free_port
from tests.runs import TINY, make_dataset

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "pretrain.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHERS = ["deepspeed", "torchrun"]


def _deepspeed(python: str = sys.executable) -> list[str]:
    command = [python, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    return [*command, "--master_port", str(free_port())]  # several launches on one machine


def _launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TRITON_INTERPRET"):
        environment.pop(name, None)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def _train(launcher: str, folder: Path) -> subprocess.CompletedProcess[str]:
    prefix = make_dataset(folder / "data")
    command = _deepspeed() if launcher == "deepspeed" else TORCHRUN
    flags = [*TINY, "--tensor-model-parallel-size", "2", "--data-path", prefix]
    return _launch([*command, SCRIPT, *flags, "--run-dir", str(folder / "run")])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, Future]]:
    """A run below each launcher, side by side: most of their time launchers import, one by one."""
    folders = {launcher: tmp_path_factory.mktemp(launcher) for launcher in LAUNCHERS}
    with ThreadPoolExecutor() as pool:
        return {name: (path, pool.submit(_train, name, path)) for name, path in folders.items()}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_ends_with_the_table(runs, launcher):
    folder, future = runs[launcher]
    done = future.result()
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert "Run finished: recipe fst, 20 steps" in output
    assert output.count("0.5000  yes           yes") == 4, output
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    assert len(rows) == 20


def test_bad_input_ends_the_launch_with_an_error(tmp_path, quick_python):
    flags = [*TINY, "--data-path", str(tmp_path / "missing"), "--run-dir", str(tmp_path / "run")]
    done = _launch([*_deepspeed(str(quick_python)), SCRIPT, *flags])
    output = done.stdout + done.stderr
    assert done.returncode != 0
    # DeepSpeed's launcher ends the other ranks as soon as one has gone, perhaps before they have
    # spoken; that every rank says it is tested in tests/train/test_bad_input.py.
    assert "] error" in output
    assert "Traceback" not in output and "missing" in output


def test_help_lists_flags_by_group(quick_python):
    done = _launch([str(quick_python), SCRIPT, "--help"])
    assert done.returncode == 0
    for text in ("--tensor-model-parallel-size", "sparsity:", "--sparsity-recipe", "data:"):
        assert text in done.stdout
