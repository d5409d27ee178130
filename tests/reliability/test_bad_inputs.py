"""Every bad configuration and input is one clear line with its exit code, before torch is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megasparse.errors import MegasparseError
from megasparse.preflight.settings import prepare
from tests.reliability.bad_inputs import Case, build, environment_of, good_flags

ROOT = Path(__file__).parents[2]
_SETUP = """
import sys
from megasparse.preflight.settings import prepare
assert "torch" not in sys.modules and "megatron" not in sys.modules
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def cases(root) -> list[Case]:
    return build(root)


def test_every_case_is_refused_in_one_line(root, cases, monkeypatch):
    assert len(cases) >= 80 and len({case.name for case in cases}) == len(cases)
    prepare(good_flags(root), 2)  # what they all spoil is good
    wrong = []
    for case in cases:
        with monkeypatch.context() as patch:
            for name, value in case.environment:
                patch.setenv(name, value)
            try:
                prepare([*good_flags(root), *case.flags], case.world)
                wrong.append(f"{case.name}: accepted")
            except MegasparseError as error:
                if error.exit_code != case.code or case.words not in str(error):
                    wrong.append(f"{case.name}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["heads", "idx-tail", "load-empty", "run-dir-is-file"])
def test_the_launcher_prints_it_on_every_rank(root, cases, name):
    (case,) = [case for case in cases if case.name == name]
    for rank in range(2):
        process = subprocess.run(
            [sys.executable, "launch/pretrain.py", *good_flags(root), *case.flags],
            env=environment_of(case, rank),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        errors = [line for line in process.stderr.splitlines() if "Error: " in line]
        assert process.returncode == case.code, process.stderr
        assert len(errors) == 1 and case.words in errors[0] and f"[rank {rank}]" in errors[0]
        assert "Traceback" not in process.stderr


def test_checks_need_no_torch():
    subprocess.run([sys.executable, "-c", _SETUP], check=True, cwd=ROOT, env=dict(os.environ))
