"""Files of a checkpoint are readable by others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megasparse.checkpoint.writer import publish
from megasparse.errors import CheckpointError
from tests.checkpoint.saves import (
    META,
    tensors_of,
    write_checkpoint,
)


def test_files_are_plain_safetensors(tmp_path):
    folder = write_checkpoint(tmp_path, 7, ranks=1)
    loaded = load_file(folder / "rank-00000.safetensors")
    for name, (_, value) in tensors_of(7).items():
        assert torch.equal(loaded[name], value)


def _events(monkeypatch, tmp_path, hook=None) -> list[tuple[str, str]]:
    """What a save does to the disk that a power cut could undo, in its order."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", str(path.relative_to(tmp_path))))
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_checkpoint(tmp_path, 3)
    return events


def test_all_is_on_the_disk_before_it_gets_its_name_and_then_the_name(monkeypatch, tmp_path):
    events = _events(monkeypatch, tmp_path)
    temporary = "step-00000003.tmp-ab"
    named = events.index(("rename", "step-00000003"))
    synced = {path for what, path in events[:named] if what == "sync"}
    content = {"rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"}
    assert synced >= {f"{temporary}/{name}" for name in content}
    # The folder's entries, once all files are in it; after the rename the folder of the name.
    last_file = max(i for i, (_, path) in enumerate(events[:named]) if path.endswith("json"))
    assert ("sync", temporary) in events[last_file:named]
    assert ("sync", ".") in events[named:]


@pytest.mark.parametrize("odd", [{"step": "1"}, {"surprise": 1}, {"files": {"../evil": {}}}])
def test_a_manifest_that_readers_would_refuse_gets_no_name(tmp_path, odd):
    temporary, final = tmp_path / "step-00000001.tmp-ab", tmp_path / "step-00000001"
    temporary.mkdir()
    meta = {**META, "run_id": "ab", "step": 1, **odd}
    with pytest.raises(CheckpointError):
        publish(temporary, final, meta.pop("files", {}), meta)
    assert not final.exists() and not list(temporary.iterdir())


def test_what_is_replaced_and_cannot_be_removed_does_not_undo_a_save(monkeypatch, tmp_path):
    """A file server may hold on to an open file; the next tidying finds the rest."""
    write_checkpoint(tmp_path, 3, ranks=1)
    rmdir = os.rmdir

    def held(path, **more):
        if "old-" in str(path):
            raise OSError("held by somebody")
        rmdir(path, **more)

    monkeypatch.setattr(os, "rmdir", held)
    folder = write_checkpoint(tmp_path, 3, ranks=1)
    names = sorted(one.name.partition(".old-")[0] for one in tmp_path.iterdir() if one.is_dir())
    assert names == [folder.name] * 2
    loaded = load_file(folder / "rank-00000.safetensors")
    assert loaded and all(torch.equal(loaded[k], v) for k, (_, v) in tensors_of(3).items())
