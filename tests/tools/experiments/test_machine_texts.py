"""Text of a machine's files: each once, nothing that is no text, whatever the workers."""

from __future__ import annotations

import json

import pytest

from megasparse.errors import DataError
from tools.experiments import machine_texts as tool

SENTENCE = "def first(values): return values[0]  # the one that came before all others\n"


@pytest.fixture
def sources(tmp_path):
    """A folder of files, and the texts that are to be taken of it."""
    folder = tmp_path / "sources"
    texts = [f"# file {number}\n{SENTENCE * (5 + number % 7)}" for number in range(40)]
    for number, text in enumerate(texts):
        path = folder / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "copy.h").write_text(texts[3])
    (folder / "unknown.bin").write_text(SENTENCE * 9)
    (folder / "short.py").write_text("x = 1\n")
    (folder / "table.py").write_text("0123456789, " * 99)
    (folder / "latin.txt").write_bytes("é".encode("latin-1") * 999)
    (folder / "null.txt").write_bytes(SENTENCE.encode() * 9 + b"\0")
    (folder / "link.py").symlink_to(folder / "package0" / "module0.py")
    (folder / "loop").symlink_to(folder)
    return folder, texts


def _texts(parts):
    return [json.loads(line)["text"] for part in parts for line in part.open(encoding="utf-8")]


def test_each_text_is_taken_once(sources, tmp_path):
    folder, texts = sources
    one, other = tmp_path / "one", tmp_path / "other"
    for output, workers in ((one, 1), (other, 2)):
        output.mkdir()
        assert tool.main(
            ["--output", str(output), "--workers", str(workers), "--roots", str(folder)]
        ) in (0, None)
    parts = sorted(one.glob("machine-*.jsonl"))
    assert len(parts) == tool.PARTS
    assert sorted(_texts(parts)) == sorted(texts)
    assert all((other / part.name).read_bytes() == part.read_bytes() for part in parts)


def test_the_bytes_of_each_part_are_bounded(sources, tmp_path):
    folder, texts = sources
    most = 600 * tool.PARTS
    parts = tool.write_parts(tmp_path, [folder], most, 1)
    sizes = [sum(len(text.encode()) for text in _texts([part])) for part in parts]
    assert 0 < max(sizes) <= 600 and sum(sizes) < sum(map(len, texts))


def test_a_machine_without_text_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: found no text"):
        tool.write_parts(tmp_path, [tmp_path / "empty"], 1000, 1)


def test_folders_inside_others_are_not_searched_twice(monkeypatch, tmp_path):
    inside = tmp_path / "lib"
    inside.mkdir()
    monkeypatch.setattr(tool.sys, "prefix", str(inside))
    monkeypatch.setattr(tool.sys, "base_prefix", str(tmp_path))
    found = tool.roots()
    assert tmp_path.resolve() in found and inside.resolve() not in found
