"""Every form of input gives the same dataset; damage and bad lines are told by their place."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megasparse.data import inputs, preprocess
from megasparse.data.inputs import find_inputs, read_records
from megasparse.data.jsonl import read_texts
from megasparse.errors import DataError
from tests.data.test_preprocess import documents, lines, run

TEXTS = [
    "one",
    "zwei \u00e9\n",
    "",
    "three <eod> \U0001f389",
    *(f"text {n}" * n for n in range(40)),
]
PLAIN = lines(*({"text": text, "n": number} for number, text in enumerate(TEXTS)))
FIRST = PLAIN.index(b"\n", 200) + 1


def zstd(*parts: bytes) -> bytes:
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


FORMS = {
    "plain": PLAIN,
    "gzip": gzip.compress(PLAIN),
    "gzip, two members": gzip.compress(PLAIN[:FIRST]) + gzip.compress(PLAIN[FIRST:]),
    "zstd": zstd(PLAIN),
    "zstd, two frames": zstd(PLAIN[:FIRST], PLAIN[FIRST:]),
}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, model_file: Path) -> list[list[int]]:
    (summary,) = run(tmp_path_factory.mktemp("plain"), model_file, PLAIN)
    return documents(summary.prefix)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pipe", [False, True])
def test_every_form_gives_the_same_documents(
    tmp_path: Path, model_file: Path, wanted, form: str, pipe: bool
) -> None:
    content = FORMS[form]
    if pipe:  # as `<(zcat ...)` is to a command
        reading, writing = os.pipe()
        with os.fdopen(writing, "wb") as stream, os.fdopen(reading):
            thread = threading.Thread(target=lambda: (stream.write(content), stream.close()))
            thread.start()
            (summary,) = run(tmp_path, model_file, Path(f"/dev/fd/{reading}"))
            thread.join()
    else:
        (summary,) = run(tmp_path, model_file, content)
    assert documents(summary.prefix) == wanted and summary.num_empty == TEXTS.count("")
    read = json.loads((tmp_path / "out" / "d_manifest.json").read_text())["inputs"][0]
    assert read["kind"] == ("jsonl" if form == "plain" else form.split(",")[0])
    assert read["bytes"] == len(content) and read["records"] == len(TEXTS)


def test_a_folder_is_read_by_name_whatever_its_files_are(
    tmp_path: Path, model_file: Path, wanted
) -> None:
    folder = tmp_path / "shards"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    thirds = [TEXTS[:10], TEXTS[10:20], TEXTS[20:]]
    (folder / "a.jsonl.zst").write_bytes(zstd(lines(*({"text": t} for t in thirds[0]))))
    table = pyarrow.table({"other": [1] * 10, "text": thirds[1]})
    pyarrow.parquet.write_table(table, folder / "b" / "1.parquet", row_group_size=3)
    (folder / "b" / "2.json.gz").write_bytes(
        gzip.compress(lines(*({"text": t} for t in thirds[2])))
    )
    for name in ("notes.txt", ".hidden/x.jsonl", "a.bin"):
        (folder / name).write_bytes(b"not read")
    (summary,) = run(tmp_path, model_file, folder, workers=2)
    assert documents(summary.prefix) == wanted
    manifest = json.loads((tmp_path / "out" / "d_manifest.json").read_text())
    assert [Path(i["path"]).name for i in manifest["inputs"]] == [
        "a.jsonl.zst",
        "1.parquet",
        "2.json.gz",
    ]
    assert [i["records"] for i in manifest["inputs"]] == [10, 10, len(TEXTS) - 20]
    for entry in manifest["inputs"]:
        content = Path(entry["path"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == inputs.hashlib.sha256(content).hexdigest()
    assert manifest["datasets"][summary.prefix] == {"documents": len(wanted), "empty": 2}
    assert list(read_texts(folder)) == TEXTS  # what trains a tokenizer reads the same


def damaged_parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FORMS["gzip"][:-20], "input0.jsonl: found damaged gzip data after line"),
        (FORMS["gzip"] + b"rest", "found damaged gzip data after line"),
        (b"\x1f\x8b\x08\x00 abc", "found damaged gzip data after line 0"),
        (FORMS["zstd"][:-5], "found zstd data that is cut off at the end"),
        (FORMS["zstd, two frames"][:-5], "found zstd data that is cut off at the end"),
        (FORMS["zstd"][:20] + b"xxxxxxxx" + FORMS["zstd"][28:], "found damaged zstd data"),
        (FORMS["zstd"] + b"rest", "found damaged zstd data"),
        (b"PAR1" + b"nothing of it", "found damaged Parquet data"),
        (damaged_parquet()[:-8], "found damaged Parquet data"),
    ],
)
def test_damage_ends_the_work_also_when_bad_lines_are_skipped(
    tmp_path: Path, model_file: Path, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(tmp_path, model_file, content, on_bad_line="skip")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"txt": ["a"]}, "column 'text' is missing, found 'txt'"),
        ({"text": [5]}, ":1: key 'text': found int, expected a string"),
        ({"text": ["a", None]}, ":2: key 'text': found null, expected a string"),
    ],
)
def test_parquet_without_text(tmp_path: Path, model_file: Path, columns, message: str) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(DataError, match=message):
        run(tmp_path, model_file, path)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_skipped_and_counted(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(preprocess, "BATCH_BYTES", 100)
    monkeypatch.setattr(inputs, "MAX_LINE_BYTES", 300)
    bad = [b"{", b'{"text": 5}', b'{"txt": "x"}', b"\xff\xfe", b'{"text": "' + b"x" * 700 + b'"}']
    content = b"".join(b'{"text": "good"}\n' + line + b"\n" for line in bad * 3)
    table = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fine", None]}), table)
    (summary,) = run(tmp_path, model_file, content, table, on_bad_line="skip", workers=workers)
    assert len(documents(summary.prefix)) == 16
    assert summary.bad.of_input == {str(tmp_path / "input0.jsonl"): 15, str(table): 1}
    places = [int(place.split(":")[1]) for place in summary.bad.first]
    assert places == list(range(2, 22, 2)) and "broken JSON" in summary.bad.first[0]
    manifest = json.loads((tmp_path / "out" / "d_manifest.json").read_text())
    assert manifest["bad_lines"] == {"count": 16, "first": summary.bad.first}
    assert [entry["bad"] for entry in manifest["inputs"]] == [15, 1]
    with pytest.raises(DataError, match="on_bad_line: found 'warn', expected error or skip"):
        run(tmp_path, model_file, content, on_bad_line="warn", name="other")
    with pytest.raises(DataError, match=r"\(0 empty, 2 bad lines skipped\)"):
        run(tmp_path, model_file, b"{\n[]\n", on_bad_line="skip", name="other")


def test_a_missing_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zst"
    path.write_bytes(FORMS["zstd"])
    monkeypatch.setitem(inputs.sys.modules, "zstandard", None)
    with pytest.raises(DataError, match="zstd needs the package zstandard: pip install zstandard"):
        list(read_records(find_inputs([path])[0], ["text"]))


def test_an_empty_pipe_is_told(tmp_path: Path, model_file: Path) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading), pytest.raises(DataError, match="found an empty input"):
        run(tmp_path, model_file, Path(f"/dev/fd/{reading}"))
