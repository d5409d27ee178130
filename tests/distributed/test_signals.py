"""Which signals stop a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megasparse.distributed.signals import SIGNALS, StoppedEarly, StopRequest
from tests.runs import TINY

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_run_under_nohup_outlives_its_terminal(ignored):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        stop = StopRequest().install()
        signal.raise_signal(signal.SIGHUP)
        assert stop.reason(None) == (0 if ignored else signal.SIGHUP)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason(None) == (signal.SIGUSR1 if ignored else signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_during_imports_ends_the_process_at_once():
    """And one that came before them; afterwards the loop decides."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        left: list[StoppedEarly] = []
        stop = StopRequest().install()
        with stop.at_once(left.append):
            assert not left
            signal.raise_signal(signal.SIGUSR1)
            assert "before the ranks had met (SIGUSR1)" in str(left[0])
        with stop.at_once(left.append):
            assert len(left) == 2
        signal.raise_signal(signal.SIGTERM)
        assert len(left) == 2 and stop.reason(None) == signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_the_handlers_are_there_waits_for_them(tmp_path, number):
    """It comes when the script begins to import what handles it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def strike(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'megasparse.distributed.signals':\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "sys.addaudithook(strike)\n"
    )
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *TINY, "--mock-data"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 75, done.stderr
    assert f"stopped before the ranks had met ({signal.Signals(number).name})" in done.stderr
