"""Files and folders appear whole or not at all, are synced before they get their name, and errors
are of the caller's class."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from megasparse import atomic_files
from megasparse.atomic_files import (
    check_free_space,
    new_folder,
    replacing,
    require_empty,
    temporaries_of,
    temporary_path,
    write_json,
    write_text,
)
from megasparse.errors import DataError, StorageError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What is synced and renamed, in order."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_rename(source, target):
        seen.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(atomic_files.os, "fsync", note_sync)
    monkeypatch.setattr(atomic_files.os, "replace", note_rename)
    return seen


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path, calls):
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"schlüssel": [1, 2]}, indent=1)
    assert json.loads(path.read_text("utf-8")) == {"schlüssel": [1, 2]}
    assert path.read_text("utf-8").endswith("]\n}\n")
    assert calls == [f"sync {temporary_path(path).name}", "rename a.json", "sync folder"]


def test_a_file_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(RuntimeError), replacing(path) as stream:
        stream.write(b"after")
        raise RuntimeError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_errors_are_of_the_class_that_is_given(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.txt"
    with pytest.raises(NotADirectoryError):
        write_text(path, "")
    for kind in (DataError, StorageError):
        with pytest.raises(kind, match="a.txt: cannot write: Not a directory"):
            write_text(path, "", kind)
        with pytest.raises(kind, match="a.txt: cannot write"), new_folder(path, kind):
            pass


def test_what_killed_writers_leave_is_found(tmp_path):
    path = tmp_path / "a.json"
    left = [tmp_path / ".a.json.7.tmp", tmp_path / ".a.json.12.tmp"]
    for other in (*left, tmp_path / ".b.json.7.tmp", path):
        other.write_text("")
    assert temporaries_of(path) == sorted(left)


def test_a_folder_appears_whole(tmp_path, calls):
    path = tmp_path / "new"
    path.mkdir()  # an empty one may be there
    with new_folder(path, StorageError) as folder:
        (folder / "a").write_text("")
        assert not list(path.iterdir())
    assert [entry.name for entry in path.iterdir()] == ["a"]
    hidden = temporary_path(path).name
    assert calls == [f"sync {hidden}", "rename new", f"sync {tmp_path.name}"]
    with pytest.raises(StorageError, match="is not empty"):
        require_empty(path, StorageError)
    with pytest.raises(StorageError, match="is no folder"):
        require_empty(path / "a", StorageError)


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "new", StorageError) as folder:
        (folder / "a").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_said_in_bytes(tmp_path):
    check_free_space(tmp_path, 1, StorageError)
    with pytest.raises(StorageError, match=r"no room for a model: \d+ bytes free, 1\d+ needed"):
        check_free_space(tmp_path, 10**18, StorageError, "a model")


def test_nothing_else_syncs_or_replaces_files():
    """Other modules use this one; none has a temporary name of its own."""
    for folder in ("megasparse", "tools", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == ROOT / "megasparse" / "atomic_files.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    name = f"{node.value.id}.{node.attr}"
                    assert name not in ("os.fsync", "os.replace"), f"{path}: {name}"
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    method = node.func.attr
                    assert method not in ("write_text", "write_bytes"), f"{path}: {method}"
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not node.value.endswith(".tmp"), f"{path}: {node.value}"
