"""One writer a folder; a lock whose owner is gone is taken over."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import time

import pytest

from megasparse.checkpoint import lock as lock_module
from megasparse.checkpoint import lock_owner
from megasparse.checkpoint.lock import FolderLock, RunLock, require_free
from megasparse.checkpoint.lock_owner import owner_of
from megasparse.distributed.environment import is_same_launch
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


def _child(work) -> tuple[int, int]:
    """A process that does `work` and then waits; its id, and a pipe that says when it has."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        kept = work()
        os.write(writing, b"x")
        time.sleep(60)
        del kept
        os._exit(0)
    assert os.read(reading, 1)
    return child, reading


def _end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_line_says_who_how_long_silent_and_when_it_is_free(tmp_path):
    child, _ = _child(lambda: FolderLock(tmp_path))
    try:
        os.utime(tmp_path / ".lock", (time.time() - 500,) * 2)  # suspended for long, but alive
        with pytest.raises(StorageError) as refused:
            FolderLock(tmp_path)
    finally:
        _end(child)
    line = str(refused.value)
    assert re.search(rf"process {child} on \S+, since \S+, last seen [45]\d\d s ago; its", line)
    assert "its process is alive, the folder is free once it has ended" in line


def test_a_lock_that_is_deleted_still_counts_and_is_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "REFRESH_SECONDS", 0.05)
    child, _ = _child(lambda: FolderLock(tmp_path))
    try:
        (tmp_path / ".lock").unlink()
        monkeypatch.setattr(lock_module, "REFRESH_SECONDS", 10.0)  # of this process
        with pytest.raises(StorageError, match=f"process {child} on "):
            FolderLock(tmp_path)
    finally:
        _end(child)
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("ahead", [10.0, 86400.0, 1e9])
def test_a_time_stamp_in_the_future_is_said_and_counts_from_now(tmp_path, monkeypatch, ahead):
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    os.utime(path, (time.time() + ahead,) * 2)
    with pytest.raises(StorageError) as refused:
        FolderLock(tmp_path)
    line = str(refused.value)
    assert "last seen 0 s ago" in line and "-" not in re.sub(r"\S*/\S*", "", line)
    assert re.search(r"lay \d+ s in the future\); the folder may be taken over after 120 s", line)
    assert path.stat().st_mtime <= time.time() + 1
    monkeypatch.setattr(lock_owner, "STALE_SECONDS", 0.0)
    FolderLock(tmp_path).release()


def test_nothing_is_left_after_the_end(tmp_path, monkeypatch):
    lock = FolderLock(tmp_path)
    monkeypatch.setattr(lock_module, "REFRESH_SECONDS", 0.01)  # the owner is waited for no longer
    with pytest.raises(StorageError):  # also of the same process
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_taken_over_is_told(tmp_path):
    lock = FolderLock(tmp_path)
    lock.check()
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "nonce": "x"}))
    with pytest.raises(StorageError, match="taken over by process 7 on elsewhere"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == 7  # it is the other's now


@pytest.mark.parametrize("shared", ["run", "checkpoints"])
def test_a_run_has_all_of_its_folders_or_none(tmp_path, shared):
    folders = [tmp_path / name for name in ("run", "checkpoints", "other")]
    for folder in folders:
        folder.mkdir()
    child, _ = _child(lambda: RunLock(folders[:2]))
    try:
        for order in ([tmp_path / shared, folders[2]], [folders[2], tmp_path / shared]):
            with pytest.raises(StorageError, match=f"{shared}: another run writes here"):
                RunLock(order)
            assert owner_of(folders[2]) is None
    finally:
        _end(child)
    RunLock([*folders, tmp_path / "run" / ".." / "run"]).release()


def test_ranks_of_one_start_know_their_own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "5000")
    monkeypatch.setattr(lock_module, "NOTE_SECONDS", 0.05)
    child, _ = _child(lambda: FolderLock(tmp_path))
    try:
        monkeypatch.setenv("MEGASPARSE_LAUNCH", str(os.getpid()))  # what the child's parent is
        require_free([tmp_path], is_same_launch)
        for name, value in (("MEGASPARSE_LAUNCH", "1"), ("MASTER_PORT", "5001")):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                with pytest.raises(StorageError, match=f"process {child} on "):
                    require_free([tmp_path], is_same_launch)
        # Looking does not take the lock from its owner.
        with pytest.raises(StorageError):
            FolderLock(tmp_path)
    finally:
        _end(child)


@pytest.mark.parametrize("before", ["", '{"pid": 7, "host": "elsewhere"}'])
def test_a_rank_waits_for_the_note_of_its_own_rank_0(tmp_path, monkeypatch, before):
    """Between lock and note `.lock` is empty, or tells of the launch before."""
    monkeypatch.setattr(lock_module, "NOTE_SECONDS", 60.0)
    path = tmp_path / ".lock"
    path.write_text(before)
    seen = []

    def lock():
        own = os.open(path, os.O_RDWR)
        fcntl.lockf(own, fcntl.LOCK_EX)
        return own

    def ours(record):
        seen.append(record)
        if len(seen) == 3:
            path.write_text('{"mine": true}')
        return record.get("mine", False)

    child, _ = _child(lock)
    try:
        require_free([tmp_path], ours)
    finally:
        _end(child)
    assert len(seen) == 4 and not seen[0].get("mine")


def test_a_refusal_leaves_no_file_open(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "job": "42"}))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StorageError):
            FolderLock(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_line_of_a_silent_owner_says_a_second_at_least(tmp_path):
    """Rounded it could say that the folder is free, to one who is refused."""
    for silent, left in ((0.0, "120"), (119.7, "1"), (119.0, "1"), (117.4, "3")):
        line = lock_owner.Owner({"host": "elsewhere"}, silent, False).refusal(tmp_path)
        assert line.endswith(f"without a sign of life, in {left} s"), silent


def test_an_owner_without_a_name_is_waited_for_two_refreshes_and_no_longer(tmp_path, monkeypatch):
    clock, nameless = [100.0], lock_owner.Owner({}, 3.0, True)
    monkeypatch.setattr(lock_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        lock_module.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds)
    )
    for found in (nameless, None):
        clock[0] = 100.0
        monkeypatch.setattr(lock_module, "owner_of", lambda folder, found=found: found)
        owner = lock_module._owner_by_name(tmp_path)
        assert owner is nameless if found else owner == lock_owner.Owner({}, 0.0, True)
        waited = clock[0] - 100.0
        assert 0 <= waited - 2 * lock_module.REFRESH_SECONDS < 0.2


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_file_stays_open_whatever_comes_between(tmp_path, monkeypatch):
    before = _open_files()
    lock = FolderLock(tmp_path)
    held = _open_files()
    assert lock._thread.daemon  # a run that dies of something else ends all the same
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(lock_module, "REFRESH_SECONDS", 0.01)
    with pytest.raises(StorageError):
        FolderLock(tmp_path)
    (tmp_path / ".lock").unlink()
    lock.check()  # puts it back
    assert (tmp_path / ".lock").exists() and _open_files() == held
    lock.release()
    assert _open_files() == before

    def without(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "flock", without)  # as network file systems do
    lock = FolderLock(tmp_path)
    assert _open_files() == before + 1  # `.lock`
    lock.release()
    assert _open_files() == before


def test_a_look_at_the_lock_is_a_sign_of_life(tmp_path):
    lock, path = FolderLock(tmp_path), tmp_path / ".lock"
    os.utime(path, (time.time() - 500,) * 2)
    lock.check()
    assert abs(path.stat().st_mtime - time.time()) < 60
    lock.release()


def test_a_file_in_place_of_the_folder_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be locked: Not a directory"):
        FolderLock(tmp_path / "file")


def test_a_child_that_outlives_its_parent_keeps_no_lock(tmp_path):
    lock = FolderLock(tmp_path)
    child, _ = _child(lambda: None)
    try:
        lock.release()
        FolderLock(tmp_path).release()
    finally:
        _end(child)


@pytest.mark.parametrize("known", [False, True])
def test_one_who_is_quicker_between_the_look_and_the_lock_is_named(tmp_path, monkeypatch, known):
    """By who has it then; by what its file says where nobody can be seen."""
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "job": "42"}))
    other = lock_owner.Owner({"host": "there", "pid": 8, "job": "43"}, 0.0, True)
    answers = [None, other if known else None]
    asked: list[tuple[int, object]] = []

    def look(descriptor, folder):
        asked.append((descriptor, folder))
        return answers.pop(0)

    def refused(descriptor, how):
        assert how == fcntl.LOCK_EX | fcntl.LOCK_NB
        raise BlockingIOError

    monkeypatch.setattr(lock_module, "look", look)
    monkeypatch.setattr(lock_module.fcntl, "lockf", refused)
    who = "process 8 on there, job 43" if known else "process 7 on elsewhere, job 42"
    with pytest.raises(StorageError, match=who):
        FolderLock(tmp_path)
    assert len(asked) == 2 and asked[0] == asked[1] and answers == []
    monkeypatch.undo()
    answers = []
    os.utime(tmp_path / ".lock", (time.time() - 3600,) * 2)
    FolderLock(tmp_path).release()  # what was opened and locked on the way is free again
