"""What a run starts from, by its settings, and what its saver knows then."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasparse.checkpoint import directory, run_directory
from megasparse.checkpoint.identity import run_of
from megasparse.checkpoint.manifest import MANIFEST
from megasparse.checkpoint.run_directory import RunFolder
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from tests.checkpoint.saves import META, tensors_of, write_checkpoint

ALONE = ControlPlane(None)
A, B = "a" * 32, "b" * 32


@pytest.fixture
def compared(monkeypatch) -> list[tuple[int, Any]]:
    """Checkpoints that were compared with the run: step and digests."""
    found: list[tuple[int, Any]] = []
    monkeypatch.setattr(
        run_directory,
        "check_same_run",
        lambda reader, config, digests: found.append((reader.meta["step"], digests)),
    )
    return found


def _folder(root: Path, **settings: Any) -> RunFolder:
    given = {
        "save": str(root / "own"),
        "resume": True,
        "load": None,
        "finetune": False,
        "branch_from": None,
        "keep_last": 3,
        "save_retain_interval": 4,
        "async_save": False,
        "max_failed_saves": 0,
        **settings,
    }
    config: Any = SimpleNamespace(checkpoint=SimpleNamespace(**given))
    return RunFolder(config, ALONE)


def _step(reader: Any) -> int | None:
    return None if reader is None else reader.meta["step"]


@pytest.mark.parametrize(
    ("own", "settings", "step"),
    [
        (False, {}, None),
        (True, {}, 2),
        (True, {"resume": False}, None),
        (True, {"load": "other"}, 2),
        (True, {"load": "other", "resume": False}, 5),
        (False, {"load": "other"}, 5),
        (False, {"load": "other", "finetune": True}, None),
        (True, {"load": "other", "finetune": True}, 2),
        (False, {"branch_from": "other"}, 5),
        (False, {"branch_from": "other/step-00000004"}, 4),
        (True, {"branch_from": "other"}, 2),
        (False, {"branch_from": "other/step-00000004", "load": "other"}, 5),
        (False, {"branch_from": "other/step-00000004", "load": "other", "finetune": True}, 4),
    ],
)
def test_a_run_starts_from_its_own_newest_or_from_what_it_is_told(
    tmp_path, compared, own, settings, step
):
    for n in (4, 5):
        write_checkpoint(tmp_path / "other", n)
    for n in (1, 2) if own else ():
        write_checkpoint(tmp_path / "own", n)
    for name in {"load", "branch_from"} & settings.keys():
        settings = {**settings, name: str(tmp_path / settings[name])}
    folder = _folder(tmp_path, **settings)
    assert _step(folder.find_checkpoint({"d": "x"})) == step
    assert compared == ([] if step is None else [(step, {"d": "x"})])
    assert folder.make_saver(lambda _: None).saved_step == (step if step == 2 else None)


@pytest.mark.parametrize("name", ["load", "branch_from"])
def test_what_is_asked_for_has_to_be_there(tmp_path, compared, name):
    with pytest.raises(CheckpointError, match=f"{name}: .*nothing holds no checkpoint"):
        _folder(tmp_path, **{name: str(tmp_path / "nothing")}).find_checkpoint({})
    assert not compared


def test_newer_ones_that_are_damaged_are_set_aside_where_the_run_goes_on(tmp_path, compared):
    for n in (1, 2, 3):
        write_checkpoint(tmp_path / "own", n)
    for n in (2, 3):
        (directory.step_folder(tmp_path / "own", n) / MANIFEST).write_bytes(b"{}")
    assert _step(_folder(tmp_path).find_checkpoint({})) == 1
    names = {path.name for path in (tmp_path / "own").glob("step-*")}
    assert names == {"step-00000001", "step-00000002.damaged-0", "step-00000003.damaged-0"}


def test_a_run_keeps_its_name_over_all_of_its_starts(tmp_path, compared):
    def name(**settings: Any) -> str:
        folder = _folder(tmp_path, **settings)
        folder.find_checkpoint({})
        run_id = folder.make_saver(lambda _: None)._run_id
        assert len(run_id) == 32 and run_of(run_id) == run_id[:16]
        assert folder.make_saver(lambda _: None)._run_id[16:] != run_id[16:]  # of this start
        return run_id[:16]

    own = tmp_path / "own"
    assert name() != name()  # nothing is there yet
    write_checkpoint(own, 1, run_id=A)
    assert name() == "a" * 16  # by the checkpoint: the pointer does not say
    directory.write_pointer(own, 1, "a" * 16)
    shutil.rmtree(own / "step-00000001")
    assert name() == "a" * 16  # by the pointer
    (own / directory.POINTER).unlink()
    write_checkpoint(tmp_path / "other", 4, run_id=B)
    assert name(load=str(tmp_path / "other")) != "b" * 16  # another run's is no name of its own


def test_the_saver_does_what_the_settings_say(tmp_path, compared):
    points: list[str] = []
    saver = _folder(tmp_path, max_failed_saves=1).make_saver(points.append)
    for step in range(1, 9):
        saver.save(step, tensors_of(step), META)
        saver.finish()
    assert directory.list_steps(tmp_path / "own") == [8, 7, 6, 4]
    assert "save:begin" in points and not saver._async and saver._allowed_failures == 1
    assert _folder(tmp_path, async_save=True).make_saver(points.append)._async
