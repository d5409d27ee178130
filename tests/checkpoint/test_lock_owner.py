"""Who has a lock, by what `.lock` says and by how long it has said it."""

from __future__ import annotations

import json
import os
import time

import pytest

from megasparse.checkpoint import lock as lock_module
from megasparse.checkpoint import lock_owner
from megasparse.checkpoint.lock import FolderLock, RunLock, require_free
from megasparse.checkpoint.lock_owner import Owner, owner_of
from megasparse.errors import StorageError

ELSEWHERE = {"host": "elsewhere", "pid": 7}


def _note(folder, record=ELSEWHERE, ago=0.0):
    path = folder / ".lock"
    path.write_text(json.dumps(record))
    os.utime(path, (time.time() - ago,) * 2)
    return path


@pytest.mark.parametrize(
    # By the clock of the file system; two seconds of difference are none.
    ("age", "silent", "ahead"),
    [(0.0, 0.0, 0.0), (1.5, 1.5, 0.0), (-1.0, 0.0, 0.0), (-2.0, 0.0, 0.0), (-2.5, 0.0, 2.5)],
)
def test_silence_and_time_stamps_ahead(tmp_path, monkeypatch, age, silent, ahead):
    path = _note(tmp_path)
    os.utime(path, (1000.0, 1000.0))
    monkeypatch.setattr(lock_owner, "_now", lambda _: 1000.0 + age)
    assert owner_of(tmp_path) == Owner(ELSEWHERE, silent, False, ahead)


@pytest.mark.parametrize(("age", "held"), [(119.5, True), (120.0, False)])
def test_an_owner_elsewhere_counts_for_two_minutes(tmp_path, monkeypatch, age, held):
    os.utime(_note(tmp_path), (1000.0, 1000.0))
    monkeypatch.setattr(lock_owner, "_now", lambda _: 1000.0 + age)
    assert (owner_of(tmp_path) is not None) == held


def test_a_look_leaves_no_file_and_follows_no_link(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    path = _note(tmp_path)
    assert owner_of(tmp_path) is not None and os.listdir(tmp_path) == [".lock"]
    assert len(os.listdir("/proc/self/fd")) == before
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert owner_of(tmp_path) is None


@pytest.mark.parametrize(
    ("record", "here"),
    [
        ({"boot": "this", "host": "any"}, True),
        ({"boot": "other", "host": "us"}, False),
        ({"host": "us"}, True),
        ({"host": "them"}, False),
        ({"boot": None, "host": "us"}, True),
        ({"pid": 7}, True),
        ({}, True),  # whose owner had not said who it is
    ],
)
def test_an_owner_of_this_boot_is_gone_if_the_lock_is_free(tmp_path, monkeypatch, record, here):
    monkeypatch.setattr(lock_owner, "_boot", lambda: "this")
    monkeypatch.setattr(lock_owner.socket, "gethostname", lambda: "us")
    _note(tmp_path, record)
    assert (owner_of(tmp_path) is None) == here


@pytest.mark.parametrize(
    ("job", "start", "record", "earlier"),
    [
        ("42", "1", {"job": "42", "start": "0"}, True),
        ("42", None, {"job": "42", "start": "0"}, False),  # not queued again
        ("42", None, {"job": "42", "start": "1"}, True),
        ("43", "1", {"job": "42", "start": "0"}, False),
        (None, "1", {"job": None, "start": "0"}, False),
    ],
)
def test_an_earlier_start_is_of_the_same_job(monkeypatch, job, start, record, earlier):
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", start)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert lock_owner._is_earlier_start(record) == earlier
    own = lock_owner.own_record()
    assert own["job"] == job and own["start"] == (start or "0")


@pytest.mark.parametrize("content", [b"", b"garbage", b"[1]", b"[" * 4000, b"\xff\xfe", b"7"])
def test_a_note_that_is_no_record_says_nothing(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR)
    assert lock_owner.read(descriptor) == {}
    lock_owner.write(descriptor, {"pid": 7})  # in place of it, whatever its length
    assert lock_owner.read(descriptor) == {"pid": 7}
    assert json.loads((tmp_path / ".lock").read_text()) == {"pid": 7}
    os.close(descriptor)
    lock_owner.write(descriptor, {"pid": 8})  # what cannot be written is not said, no more


def test_a_refusal_says_what_is_known(tmp_path):
    line = Owner({"pid": 7, "host": "us", "job": "42", "since": "noon"}, 3.4, True).refusal(
        tmp_path
    )
    assert "process 7 on us, job 42, since noon, last seen 3 s ago; its process is alive" in line
    line = Owner({}, 0.0, False, 7.0).refusal(tmp_path)
    assert "process ? on ?, last seen 0 s ago (its time stamp lay 7 s in the future); the" in line


def _stopped_clock(monkeypatch) -> list[float]:
    """Time goes on where somebody sleeps, and nowhere else."""
    clock = [100.0]
    monkeypatch.setattr(lock_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        lock_module.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds)
    )
    return clock


@pytest.mark.parametrize("alive", [False, True])
def test_others_are_refused_at_once_unless_they_may_be_our_own_rank_0(tmp_path, monkeypatch, alive):
    clock, looks = _stopped_clock(monkeypatch), []

    def owner(folder):
        looks.append(folder)
        assert len(looks) < 1000, "waits for ever"
        return Owner({"pid": 7}, 0.0, alive)

    monkeypatch.setattr(lock_module, "owner_of", owner)
    with pytest.raises(StorageError, match="another run writes here"):
        require_free([tmp_path], lambda record: False)
    waited = clock[0] - 100.0
    assert 0 <= waited - lock_module.NOTE_SECONDS < 0.1 if alive else waited == 0
    assert len(looks) > 10 if alive else len(looks) == 1  # our rank 0 is seen at once
    require_free([tmp_path], lambda record: record == {"pid": 7})


def test_a_run_looks_after_all_of_its_folders(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    lock = RunLock(folders)
    lock.check()
    _note(folders[1], {**ELSEWHERE, "nonce": "x"})
    with pytest.raises(StorageError, match="b: taken over by process 7 on elsewhere"):
        lock.check()
    lock.release()
    assert not (folders[0] / ".lock").exists()
    FolderLock(folders[0]).release()


def test_the_time_is_that_of_the_file_system_where_it_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_owner.time, "time", lambda: 5.0)
    assert lock_owner._now(tmp_path) > 1e9
    assert lock_owner._now(tmp_path / "missing") == 5.0
