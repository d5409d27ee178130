"""Saves that are killed, fail, or are damaged afterwards: the last good checkpoint is found."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megasparse.checkpoint import directory
from megasparse.checkpoint.lock import FolderLock
from megasparse.checkpoint.manifest import MANIFEST, encode_manifest
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import Saver, choose
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError, StorageError
from tests import dist
from tests.checkpoint.saves import (
    META,
    check_content,
    corruption,
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


def test_a_replacement_that_was_cut_off_is_put_back(tmp_path):
    folder = write_checkpoint(tmp_path, 2)
    folder.rename(folder.with_name("step-00000002.old-ab"))
    (tmp_path / "step-00000003.tmp-ab").mkdir()
    (tmp_path / "step-00000004.mine").mkdir()
    directory.clean(tmp_path)
    assert choose(tmp_path, ALONE).meta["step"] == 2
    assert not (tmp_path / "step-00000003.tmp-ab").exists()
    assert (tmp_path / "step-00000004.mine").exists()


def test_all_damages_are_found_and_the_checkpoint_before_is_taken(tmp_path):
    result = corruption(tmp_path / "root", 150, seed=1)
    assert result["undetected"] == 0 and result["wrong_fallback"] == 0
    assert {"flip", "truncate", "delete", "swap", "foreign", "empty"} <= result.keys()


def test_damage_is_named_by_tensor_and_file(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    path = folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last byte of the last tensor: uint8 'c' comes last
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: damaged: tensor c: wrong"):
        CheckpointReader(folder)
    lazy = CheckpointReader(folder, verify=False)
    lazy.read("a")
    with pytest.raises(CheckpointError, match="tensor c"):
        lazy.read("c")


def test_files_are_plain_safetensors(tmp_path):
    folder = write_checkpoint(tmp_path, 7, ranks=1)
    loaded = load_file(folder / "rank-00000.safetensors")
    for name, (_, value) in tensors_of(7).items():
        assert torch.equal(loaded[name], value)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=1), "format 1, expected 2"),
        (lambda m: m.update(format=3), "format 3, expected 2"),
        (lambda m: m.update(surprise=1), r"unknown keys \['surprise'\]"),
        (lambda m: m.pop("step"), "step: found nothing, expected int"),
        (lambda m: m["files"].update({"../evil": {"size": 0, "header_sha256": ""}}), "evil"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 0, "header_sha256": ""}}), "passwd"),
        (lambda m: m["pieces"][0].update(file="rank-00009.safetensors"), "unknown file"),
        (lambda m: m["pieces"][0]["shard"].update(global_shape=[1 << 40] * 2), "invalid for input"),
        (lambda m: m["pieces"][0]["shard"].update(world=0), "no part of a tensor"),
    ],
)  # fmt: skip
def test_a_manifest_that_agrees_with_itself_is_still_checked(tmp_path, change, message):
    folder = write_checkpoint(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("sha256")
    change(manifest)
    version = manifest.pop("format")
    content = json.loads(encode_manifest(manifest))
    content["format"] = version
    (folder / MANIFEST).write_bytes(encode_manifest(manifest) if version == 2 else
                                    json.dumps(content).encode())  # fmt: skip
    with pytest.raises(CheckpointError, match=message):
        reader = CheckpointReader(folder)
        for key in list(reader.keys()):
            reader.read(key)


def test_links_are_not_followed(tmp_path):
    folder = write_checkpoint(tmp_path / "real", 1)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "step-00000001").symlink_to(folder)
    assert directory.list_steps(tmp_path / "root") == []
    path = folder / "rank-00000.safetensors"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointReader(folder)


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
