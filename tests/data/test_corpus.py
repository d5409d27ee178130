"""The corpus: deterministic, within its bound, real text, and whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasparse.data import corpus
from megasparse.data.jsonl import read_texts
from megasparse.errors import DataError


def make_tree(root: Path) -> Path:
    for name, content in {
        "b.py": b"x = 1\r\n\tpass\n",
        "a.py": b"# \xc3\xa9\n",
        "pkg/c.py": b"y" * 50,
        "empty.py": b"",
        "latin.py": b"# \xe9\n",
        "pkg/test/t.py": b"no",
        "site-packages/p.py": b"no",
        "notes.txt": b"no",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def test_each_source_is_one_document_with_its_exact_text(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "lib")
    summary = corpus.write_corpus(tmp_path / "c.jsonl", 1000, root)
    texts = list(read_texts(tmp_path / "c.jsonl"))
    assert sorted(texts) == sorted(["x = 1\r\n\tpass\n", "# é\n", "y" * 50])
    assert (summary.num_documents, summary.num_bytes) == (3, 13 + 5 + 50)


def test_order_depends_on_relative_names_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.rglob
    outputs = []
    for name in ("one", "two/three"):
        if outputs:  # a file system that lists in another order
            monkeypatch.setattr(
                Path, "rglob", lambda self, pattern: reversed(list(listed(self, pattern)))
            )
        output = tmp_path / f"{name.replace('/', '')}.jsonl"
        corpus.write_corpus(output, 1000, make_tree(tmp_path / name))
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]


def test_bound_leaves_out_whole_documents(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "lib")
    summary = corpus.write_corpus(tmp_path / "c.jsonl", 30, root)
    assert sorted(read_texts(tmp_path / "c.jsonl")) == ["# é\n", "x = 1\r\n\tpass\n"]
    assert summary.num_bytes == 18


def test_standard_library_fills_the_bound(tmp_path: Path) -> None:
    summary = corpus.write_corpus(tmp_path / "c.jsonl", 500_000)
    texts = list(read_texts(tmp_path / "c.jsonl"))
    assert len(texts) == summary.num_documents > 20
    assert sum(len(text.encode()) for text in texts) == summary.num_bytes
    assert 450_000 < summary.num_bytes <= 500_000
    assert any('"""' in text and "def " in text for text in texts)


@pytest.mark.parametrize("max_bytes", [0, -1, 1])
def test_no_document_is_an_error_and_leaves_no_file(tmp_path: Path, max_bytes: int) -> None:
    (tmp_path / "lib").mkdir()
    with pytest.raises(DataError, match=f"{max_bytes}"):
        corpus.write_corpus(tmp_path / "c.jsonl", max_bytes, tmp_path / "lib")
    assert [path.name for path in tmp_path.iterdir()] == ["lib"]


def test_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="c.jsonl: cannot write: Not a directory"):
        corpus.write_corpus(tmp_path / "file" / "c.jsonl", 1000)
