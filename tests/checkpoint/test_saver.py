"""Saves that are killed, fail, or are damaged afterwards: the last good checkpoint is found."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from megasparse.checkpoint import directory, writer
from megasparse.checkpoint.lock import FolderLock
from megasparse.checkpoint.manifest import MANIFEST
from megasparse.checkpoint.saver import Saver, choose
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError, StorageError
from tests import dist
from tests.checkpoint.saves import (
    META,
    check_content,
    kill_one_save,
    save_kills,
    tensors_of,
    write_checkpoint,
)

ALONE = ControlPlane(None)


def test_nothing_published_is_lost_at_random_kills(tmp_path):
    result = save_kills(tmp_path / "root", 40, seed=1)
    assert result["lost"] == 0 and result["steps_published"] > 0


@pytest.mark.parametrize(
    "point",
    ["save:begin", "save:file", "save:sync", "save:manifest", "save:rename", "save:pointer",
     "save:prune"],
)  # fmt: skip
@pytest.mark.parametrize("async_save", [False, True])
def test_a_kill_at_every_point_leaves_the_newest_complete_checkpoint(tmp_path, point, async_save):
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)  # the process replaces step 3 twice, so old- and tmp- occur too
    found, _ = kill_one_save(tmp_path, None, point, async_save)
    published = point in ("save:pointer", "save:prune")
    assert found == (3 if published else 2)
    for delay in (0.1, 1.0, 5.0, 20.0):  # the next run goes on
        found, told = kill_one_save(tmp_path, delay, None, async_save)
        if told > 3:
            break
    assert found >= told > 3
    allowed = {".lock", directory.POINTER, *(f"step-{step:08d}" for step in range(1000))}
    assert {entry.name for entry in tmp_path.iterdir()} <= allowed


@pytest.mark.parametrize(
    "content", [None, b"", b"garbage", b"\xff\xfe\x00", b'{"step": 99}', b'{"step": "x"}', b"[]"]
)
def test_the_pointer_is_only_a_hint(tmp_path, content):
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    pointer = tmp_path / directory.POINTER
    if content is None:
        pointer.unlink()
    else:
        pointer.write_bytes(content)
    assert choose(tmp_path, ALONE).meta["step"] == 2


def test_no_intact_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    assert choose(tmp_path, ALONE) is None
    for step in (1, 2):
        (write_checkpoint(tmp_path, step) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is intact"):
        choose(tmp_path, ALONE)


@pytest.mark.parametrize("async_save", [False, True])
def test_retention_and_the_async_snapshot(tmp_path, async_save):
    saver = Saver(tmp_path, ALONE, "ab", keep_last=2, async_save=async_save)
    for step in range(1, 6):
        tensors = tensors_of(step)
        saver.save(step, tensors, META)
        for _, value in tensors.values():
            value.zero_()  # training goes on; the checkpoint must not notice
        saver.finish()
        if not async_save:
            continue
        check_content(choose(tmp_path, ALONE))
    assert directory.list_steps(tmp_path) == [5, 4] and directory.read_pointer(tmp_path) == 5
    assert saver.saved_step == 5


def test_a_manifest_has_the_state_of_its_own_step(tmp_path):
    saver = Saver(tmp_path, ALONE, "ab", async_save=True)
    history = [[1, 0.5]]
    saver.save(1, tensors_of(1), {**META, "state": {"flip_history": history}})
    history[0].append("later")
    history.append([2, 0.25])
    saver.finish()
    assert choose(tmp_path, ALONE).meta["state"]["flip_history"] == [[1, 0.5]]


def test_async_save_overlaps_and_its_failure_surfaces_at_the_next_step(tmp_path):
    write_checkpoint(tmp_path, 1)
    started = []

    def full(point: str) -> None:
        started.append(point)
        if point == "save:sync":
            time.sleep(0.2)
            raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, ALONE, "ab", async_save=True, hook=full)
    saver.save(2, tensors_of(2), META)
    assert saver.writing and saver.pending  # back before the writer has finished
    while saver.writing:
        time.sleep(0.01)
    with pytest.raises(StorageError, match="rank 0: .*No space left"):
        saver.finish()
    assert directory.list_steps(tmp_path) == [1] and not list(tmp_path.glob("*.tmp-*"))


def test_failed_saves_are_counted_and_the_limit_ends_the_run(tmp_path):
    write_checkpoint(tmp_path, 1)
    fail = [True]

    def full(point: str) -> None:
        if point == "save:sync" and fail[0]:
            raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, ALONE, "ab", max_failed_saves=1, hook=full)
    saver.save(2, tensors_of(2), META)  # tolerated
    fail[0] = False
    saver.save(3, tensors_of(3), META)
    assert directory.list_steps(tmp_path) == [3, 1]
    fail[0] = True
    saver.save(4, tensors_of(4), META)
    with pytest.raises(StorageError):
        saver.save(5, tensors_of(5), META)
    with pytest.raises(StorageError):
        saver.save(6, tensors_of(6), META, final=True)
    assert directory.list_steps(tmp_path) == [3, 1]


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=4000)
    monkeypatch.setattr("megasparse.atomic_files.shutil.disk_usage", lambda _: usage)
    message = r"no room for a checkpoint: 4000 bytes free, \d+ needed"
    with pytest.raises(CheckpointError, match=message) as error:
        Saver(tmp_path, ALONE, "ab").save(1, tensors_of(1), META)
    assert error.value.exit_code == 74 and not list(tmp_path.iterdir())


def _damaged_for_one_rank(rank: int, world: int, root: str) -> tuple[int, str]:
    """All ranks choose the same checkpoint although one alone sees the damage."""
    from pathlib import Path

    from megasparse.distributed.control_plane import make_control_plane

    control = make_control_plane()
    reader = choose(Path(root), control)
    try:
        control.on_rank_zero(lambda: FolderLock(Path("/nonexistent")))
    except StorageError as error:
        return reader.meta["step"], str(error)
    return reader.meta["step"], "no error"


def test_ranks_agree_on_checkpoint_and_errors(tmp_path):
    write_checkpoint(tmp_path, 1)
    path = write_checkpoint(tmp_path, 2) / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    results = dist.run(_damaged_for_one_rank, 2, str(tmp_path))
    assert results[0] == results[1]
    assert results[0][0] == 1 and "rank 0: /nonexistent/.lock: cannot be locked" in results[0][1]


def test_what_the_disk_changed_on_the_way_is_not_published(tmp_path):
    """The bytes of a file change between writing and reading back."""

    def strike(point):
        if point == "save:sync":
            (path,) = tmp_path.glob("*.tmp-*/rank-00000.safetensors")
            with open(path, "r+b") as stream:
                stream.seek(-1, 2)
                (last,) = stream.read(1)
                stream.seek(-1, 2)
                stream.write(bytes([last ^ 1]))

    saver = Saver(tmp_path, ALONE, run_id="ab", hook=strike)
    with pytest.raises(CheckpointError, match="rank-00000.safetensors"):
        saver.save(1, tensors_of(1), META, final=True)
    assert directory.list_steps(tmp_path) == []


def test_a_save_shows_its_bytes_unless_it_is_in_the_background(tmp_path, monkeypatch):
    bars, enabled = [], []
    make = writer.progress

    def made(**how):
        enabled.append(how["enabled"])
        bars.append(make(**how))
        return bars[-1]

    monkeypatch.setattr(writer, "progress", made)
    monkeypatch.setattr(writer, "is_logging_rank", lambda: True)
    for step, async_save in ((1, False), (2, True)):
        saver = Saver(tmp_path, ALONE, "ab", async_save=async_save)
        saver.save(step, tensors_of(step), META)
        saver.finish()
    assert enabled == [True, False]
    assert bars[0].n == bars[0].total == sum(value.nbytes for _, value in tensors_of(1).values())
