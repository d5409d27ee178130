"""The sidecar: any changed bit, exchanged file or other tokenizer is found."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest

from megasparse.data import sidecar as side
from megasparse.data.indexed import validate
from megasparse.data.indexed_writer import IndexedDatasetWriter, Provenance
from megasparse.data.sidecar import Sidecar, check_sidecar, read_sidecar
from megasparse.data.tokenizers.tokenizer import NullTokenizer, token_rules
from megasparse.errors import DataError

TOKENIZER = NullTokenizer(100)


def write(prefix: Path, seed: int = 0) -> Sidecar:
    source = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for size in source.integers(1, 40, 30):
            writer.add_document(source.integers(0, 100, size))
        sidecar = writer.finish(Provenance(TOKENIZER, True, "test.jsonl"))
    assert sidecar is not None
    return sidecar


def test_content(tmp_path: Path) -> None:
    sidecar = write(tmp_path / "d")
    index = validate(tmp_path / "d", vocab_size=100)
    assert read_sidecar(tmp_path / "d") == check_sidecar(tmp_path / "d") == sidecar
    assert (sidecar.num_documents, sidecar.num_tokens) == (index.num_documents, index.num_tokens)
    assert (sidecar.dtype, sidecar.vocab_size, sidecar.eod) == ("uint16", 100, 99)
    assert (sidecar.tokenizer_type, sidecar.source) == ("NullTokenizer", "test.jsonl")
    assert sidecar.tokenizer_digest == TOKENIZER.digest
    assert sidecar.format_version == side.FORMAT_VERSION and sidecar.append_eod


def test_foreign_dataset_has_none_and_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "d")
    (tmp_path / "d.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert check_sidecar(tmp_path / "d", TOKENIZER.digest) is None
    assert "d.json: no such file" in caplog.text


def test_other_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "d")
    check_sidecar(tmp_path / "d", TOKENIZER.digest)
    other = NullTokenizer(101).digest
    with pytest.raises(DataError) as caught:
        check_sidecar(tmp_path / "d", other)
    assert other in str(caught.value) and TOKENIZER.digest in str(caught.value)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_no_flipped_bit_is_silent(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "d")
    path = tmp_path / f"d.{suffix}"
    good = path.read_bytes()
    source = random.Random(2)
    for _ in range(200):
        content = bytearray(good)
        content[source.randrange(len(good))] ^= 1 << source.randrange(8)
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"d.{suffix}: found sha256"):
            check_sidecar(tmp_path / "d")


def test_exchanged_bin_and_sizes(tmp_path: Path) -> None:
    sidecar = write(tmp_path / "d")
    tokens = np.fromfile(tmp_path / "d.bin", dtype=np.uint16)[::-1]
    tokens.tofile(tmp_path / "d.bin")  # same size, valid tokens, another order
    validate(tmp_path / "d", vocab_size=100)
    with pytest.raises(DataError, match="damaged or was exchanged"):
        check_sidecar(tmp_path / "d")
    tokens[:-1].tofile(tmp_path / "d.bin")
    for verify in side.VERIFY_MODES:
        with pytest.raises(DataError, match=f"bytes, expected {sidecar.bin_size}"):
            check_sidecar(tmp_path / "d", verify=verify)
    (tmp_path / "d.bin").unlink()
    with pytest.raises(DataError, match="d.bin: cannot read"):
        check_sidecar(tmp_path / "d")


def test_what_each_mode_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = write(tmp_path / "d")
    content = bytearray((tmp_path / "d.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "d.bin").write_bytes(content)
    check_sidecar(tmp_path / "d", verify="index")
    for verify in ("auto", "full"):
        with pytest.raises(DataError, match="d.bin: found sha256"):
            check_sidecar(tmp_path / "d", verify=verify)
    monkeypatch.setattr(side, "AUTO_VERIFY_BYTES", sidecar.bin_size)
    check_sidecar(tmp_path / "d", verify="auto")
    with pytest.raises(DataError, match="d.bin: found sha256"):
        check_sidecar(tmp_path / "d", verify="full")
    with pytest.raises(DataError, match="found 'some', expected one of auto, index, full"):
        check_sidecar(tmp_path / "d", verify="some")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 4}, "format_version: found 4, expected 3"),
        ({"format_version": None}, "format_version: found None, expected 3"),
        ({"bin_size": "10"}, "bin_size: found '10', expected a value of type int"),
        ({"bin_size": True}, "bin_size: found True, expected a value of type int"),
        ({"append_eod": 1}, "append_eod: found 1, expected a value of type bool"),
        ({"tokenizer_digest": 5}, "tokenizer_digest: found 5, expected a value of type str"),
        ({"extra": 1}, "missing or unknown fields: 'extra'"),
    ],
)
def test_wrong_fields(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path / "d")
    path = tmp_path / "d.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError) as caught:
        check_sidecar(tmp_path / "d")
    assert f"{path}: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no JSON"),
        (b"{", "found no JSON"),
        (b"\xff\xfe", "found no JSON"),
        (b"[" * 100_000, "found no JSON"),
        (b"[]", "found a JSON list"),
        (b'{"format_version": 1}', "missing or unknown fields: 'append_eod'"),
    ],
)
def test_no_sidecar_at_all(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path / "d")
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_sidecar(tmp_path / "d")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_sidecar_of_version_1_is_read(tmp_path: Path) -> None:
    sidecar = write(tmp_path / "d")
    path = tmp_path / "d.json"
    old = {**json.loads(path.read_text()), "format_version": 1}
    for name in ("bos", "add_bos", "parse_special"):
        del old[name]
    path.write_text(json.dumps(old))
    assert read_sidecar(tmp_path / "d") == sidecar and sidecar.format_version == 3


def test_other_tokens_than_the_datasets_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "d")
    rules = token_rules(TOKENIZER)
    check_sidecar(tmp_path / "d", TOKENIZER.digest, rules=rules)
    check_sidecar(tmp_path / "d", rules={**rules, "bos": 5})  # it begins no document
    for change in ({"eod": 5}, {"add_bos": True}, {"parse_special": True}):
        with pytest.raises(DataError, match=f"made with {next(iter(change))}.*--eod-token"):
            check_sidecar(tmp_path / "d", rules={**rules, **change})
