"""Folders that were renamed, copied or swapped never cost a good checkpoint, and are named."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest

from megasparse.checkpoint import directory
from megasparse.checkpoint.identity import entries, newest_step, own_run, run_of
from megasparse.checkpoint.manifest import FORMAT, MANIFEST, encode_manifest
from megasparse.checkpoint.saver import Saver, choose, choose_and_tell
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from tests.checkpoint.saves import META, check_content, tensors_of

ALONE = ControlPlane(None)
RUNS = ("a" * 16, "b" * 16)


def _run(root, run: str, steps, keep_last: int = 0):
    root.mkdir(exist_ok=True)
    saver = Saver(root, ALONE, run + os.urandom(8).hex(), keep_last)
    for step in steps:
        saver.save(step, tensors_of(step), META)
    return saver


def _names(root) -> set[str]:
    return {path.name for path in root.glob("step-*")}


def test_a_copy_under_a_later_name_costs_nothing(tmp_path, caplog):
    _run(tmp_path, RUNS[0], (10, 15))
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000050")
    reader, damaged = choose_and_tell(tmp_path, ALONE)
    assert reader.meta["step"] == 15 and reader.folder.name == "step-00000015"
    assert damaged == [] and newest_step(tmp_path) == 15
    check_content(reader)


def test_the_only_copy_is_found_under_another_name(tmp_path, caplog):
    _run(tmp_path, RUNS[0], (10, 15))
    (tmp_path / "step-00000015").rename(tmp_path / "step-00000003")
    with caplog.at_level("WARNING"):
        reader = choose(tmp_path, ALONE)
    assert reader.meta["step"] == 15 and reader.folder.name == "step-00000003"
    assert "step-00000003: holds step 15: it was renamed or copied" in caplog.text


def test_a_foreign_checkpoint_is_named_and_left(tmp_path, caplog):
    for run, name in zip(RUNS, ("a", "b"), strict=True):
        _run(tmp_path / name, run, (5, 10))
    mine, theirs = (tmp_path / name / "step-00000010" for name in ("a", "b"))
    os.rename(mine, aside := tmp_path / "aside")
    os.rename(theirs, mine)
    os.rename(aside, theirs)
    for name in ("a", "b"):
        with caplog.at_level("WARNING"):
            reader, damaged = choose_and_tell(tmp_path / name, ALONE)
        assert reader.meta["step"] == 5 and damaged == []
        assert "step-00000010: passed over, another run wrote it" in caplog.text
    assert own_run(tmp_path / "a") == RUNS[0]
    pointer = tmp_path / "a" / directory.POINTER
    pointer.write_text(pointer.read_text().replace("aaa", "abb", 1))  # damaged: it says nothing
    assert own_run(tmp_path / "a") is None and choose(tmp_path / "a", ALONE) is not None


def test_pruning_counts_and_deletes_own_ones_alone(tmp_path):
    _run(tmp_path / "b", RUNS[1], (4,))
    saver = _run(tmp_path / "a", RUNS[0], (1, 2, 3))
    root = tmp_path / "a"
    shutil.copytree(root / "step-00000001", root / "step-00000007")
    shutil.copytree(tmp_path / "b" / "step-00000004", root / "step-00000004")
    directory.prune(root, 3, 2)
    expected = {f"step-{step:08d}" for step in (2, 3, 4, 7)}
    assert _names(root) == expected
    saver.save(4, tensors_of(4), META)  # the name that the foreign one has
    kept = {name for name in _names(root) if ".kept-" in name}
    assert kept == {"step-00000004.kept-0"} and choose(root, ALONE).meta["step"] == 4
    assert (
        run_of(json.loads((root / "step-00000004.kept-0" / MANIFEST).read_text())["run_id"])
        == (RUNS[1])
    )


def test_a_newer_format_is_refused_and_not_called_damaged(tmp_path):
    _run(tmp_path, RUNS[0], (1, 2))
    path = tmp_path / "step-00000002" / MANIFEST
    manifest = json.loads(path.read_text())
    for content in (
        encode_manifest({**manifest, "format": FORMAT + 1, "surprise": {}}),
        json.dumps({**manifest, "format": FORMAT + 7}).encode(),
    ):
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match="a newer version of megasparse wrote it"
        ) as refused:
            choose(tmp_path, ALONE)
        assert "damaged" not in str(refused.value) and "step-00000002" in str(refused.value)
    assert _names(tmp_path) == {"step-00000001", "step-00000002"}


def test_whatever_happens_to_names_the_newest_good_one_is_taken(tmp_path):
    generator = random.Random(0)
    _run(tmp_path / "other", RUNS[1], range(1, 6))
    for trial in range(25):
        root = tmp_path / f"run-{trial}"
        _run(root, RUNS[0], range(1, 6))
        for _ in range(generator.randint(1, 5)):
            folders = sorted(root.glob("step-*"))
            source = generator.choice([*folders, *sorted((tmp_path / "other").glob("step-*"))])
            target = root / f"step-{generator.randint(1, 9):08d}"
            if not target.exists():
                own = source.parent == root and generator.random() < 0.5
                (os.rename if own else shutil.copytree)(source, target)
            elif source.parent == root and source != target:
                swap = root / "swap"
                for a, b in ((source, swap), (target, source), (swap, target)):
                    os.rename(a, b)
        before = _names(root)
        reader, damaged = choose_and_tell(root, ALONE)
        assert reader.meta["step"] == 5 and run_of(reader.meta["run_id"]) == RUNS[0]
        assert damaged == [] and _names(root) == before
        check_content(reader)
        assert {e.step for e in entries(root) if not e.foreign} == set(range(1, 6))


def test_a_pointer_of_a_megabyte_and_more_is_not_read(tmp_path):
    directory.write_pointer(tmp_path, 1, RUNS[0])
    pointer = tmp_path / directory.POINTER
    text = pointer.read_text()
    for length, known in ((1 << 20, RUNS[0]), ((1 << 20) + 1, None)):
        pointer.write_text(text.ljust(length))
        assert own_run(tmp_path) == known


def test_a_folder_without_checkpoints_has_no_newest_step(tmp_path):
    assert newest_step(tmp_path) == newest_step(tmp_path / "missing") == -1
    directory.step_folder(tmp_path, 0).mkdir()
    assert newest_step(tmp_path) == 0
