"""One writer a folder; a lock whose owner is gone is taken over."""

from __future__ import annotations

import json
import os
import time

import pytest

from megasparse.checkpoint.lock import FolderLock
from megasparse.errors import StorageError


def test_a_second_writer_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        lock = FolderLock(tmp_path)
        os.write(writing, b"x")
        time.sleep(60)
        lock.release()
        os._exit(0)
    os.read(reading, 1)
    with pytest.raises(StorageError, match=f"another run writes here: process {child} on "):
        FolderLock(tmp_path)
    os.kill(child, 9)
    os.waitpid(child, 0)
    lock = FolderLock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()


def test_a_lock_of_another_host_counts_while_it_shows_life(tmp_path):
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "job": "42"}))
    with pytest.raises(StorageError, match="process 7 on elsewhere, job 42, last seen"):
        FolderLock(tmp_path)
    os.utime(path, (time.time() - 3600,) * 2)
    FolderLock(tmp_path).release()


def test_a_job_that_was_queued_again_takes_over_its_own_lock_on_another_host(tmp_path, monkeypatch):
    owner = {"host": "elsewhere", "pid": 7, "job": "42", "start": "0"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with pytest.raises(StorageError, match="job 42, last seen"):  # the same start: still running
        FolderLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    FolderLock(tmp_path).release()
