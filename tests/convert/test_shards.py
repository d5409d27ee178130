"""How tensors are divided over files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megasparse.convert.huggingface.folder import INDEX, SINGLE
from megasparse.convert.huggingface.shards import Group, write_model
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
