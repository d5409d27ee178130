"""How tensors are divided over files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megasparse.convert.huggingface import shards
from megasparse.convert.huggingface.folder import INDEX, SINGLE
from megasparse.convert.huggingface.shards import Group, write_model
from megasparse.errors import StorageError
from megasparse.tensor_files import Entry

BYTES = {"a": 40, "b": 60, "c": 4, "d": 200, "e": 100}


def groups(made):
    def make(name):
        made.append(name)
        return {name: torch.full((BYTES[name] // 4,), float(len(made)))}

    return [
        Group((Entry(name, torch.float32, (size // 4,)),), lambda name=name: make(name))
        for name, size in BYTES.items()
    ]


@pytest.mark.parametrize(
    ("limit", "files"),
    [
        (1, ["a", "b", "c", "d", "e"]),
        (99, ["a", "bc", "d", "e"]),
        (100, ["ab", "c", "d", "e"]),  # exactly full
        (104, ["abc", "d", "e"]),
        (304, ["abcd", "e"]),
        (404, ["abcde"]),
    ],
)
def test_a_file_takes_what_fits(tmp_path, limit, files):
    made: list[str] = []
    written = write_model(tmp_path, groups(made), limit)
    assert made == list(BYTES)  # each once, in order
    by_file: dict[str, str] = {}
    for name in BYTES:
        by_file[written[name]["file"]] = by_file.get(written[name]["file"], "") + name
    assert list(by_file.values()) == files
    for file, names in by_file.items():
        stored = load_file(tmp_path / file)
        assert "".join(sorted(stored)) == names
        for name in names:
            assert (stored[name] == made.index(name) + 1).all()
    if len(files) == 1:
        assert list(by_file) == [SINGLE] and not (tmp_path / INDEX).exists()
        return
    count = len(files)
    assert list(by_file) == [
        f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(BYTES.values())
    assert index["weight_map"] == {name: written[name]["file"] for name in BYTES}


@pytest.mark.parametrize("bar", [False, True])
def test_room_is_asked_for_first_and_bytes_are_shown(tmp_path, monkeypatch, bar):
    """A MiB more than the values take, for headers and the index."""
    asked, shown, total = [], [], sum(BYTES.values())

    class Bar:
        def __init__(self, **options):
            assert options["total"] == total and options["enabled"] is bar

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            shown.append(count)

    monkeypatch.setattr(shards, "check_free_space", lambda *a: asked.append(a))
    monkeypatch.setattr(shards, "progress", Bar)
    made: list[str] = []
    write_model(tmp_path, groups(made), 100, *([True] if bar else []))
    assert asked == [(tmp_path, total + 2**20, StorageError)] and shown == list(BYTES.values())
