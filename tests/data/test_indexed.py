"""Indexed datasets: Megatron's bytes, and every damage named before a token is used."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megasparse.data import indexed
from megasparse.data.indexed import optimal_dtype, read_index, validate
from megasparse.data.indexed_writer import IndexedDatasetWriter
from megasparse.errors import DataError

DOCUMENTS = [[5, 6, 7], [1], [2, 3, 4, 9, 8], [0, 0]]


def write(prefix: Path, documents: list[list[int]], dtype: type | np.dtype = np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    return prefix


def write_with_megatron(prefix: Path, documents: list[list[int]], dtype: type) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_bytes_are_those_of_megatron(tmp_path: Path, dtype: type) -> None:
    source = np.random.default_rng(0)
    documents = [source.integers(0, 200, size).tolist() for size in source.integers(1, 60, 300)]
    ours = write(tmp_path / "ours", documents, dtype)
    assert contents(ours) == contents(write_with_megatron(tmp_path / "megatron", documents, dtype))


def test_bytes_do_not_depend_on_how_documents_are_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = write(tmp_path / "one", DOCUMENTS)
    monkeypatch.setattr("megasparse.data.indexed_writer._CHUNK", 2)
    with IndexedDatasetWriter(tmp_path / "bulk", np.uint16) as writer:
        writer.add_documents(np.array([5, 6, 7, 1], dtype=np.int64), [3, 1])
        writer.add_documents(np.array([2, 3, 4, 9, 8, 0, 0], dtype=np.uint16), [5, 2])
        assert (writer.num_documents, writer.num_tokens) == (4, 11)
        writer.finish()
    assert contents(tmp_path / "bulk") == contents(one_by_one)


def test_megatron_reads_it(tmp_path: Path) -> None:
    dataset = IndexedDataset(str(write(tmp_path / "d", DOCUMENTS)))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/d.bin", dtype=np.int32)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_document(torch.arange(4), [4])
    builder.finalize(f"{tmp_path}/d.idx")
    index = validate(tmp_path / "d", vocab_size=5)
    assert index.document_indices.tolist() == [0, 2, 3]
    assert (index.num_sequences, index.num_documents, index.num_tokens) == (3, 2, 9)
    assert index.lengths.tolist() == [2, 3, 4] and index.pointers.tolist() == [0, 8, 20]


@pytest.mark.parametrize("vocab_size", [2, 65499, 65500, 65536, 200000])
def test_dtype_is_megatrons_choice(vocab_size: int) -> None:
    assert optimal_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_validate_accepts_whole_datasets(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    index = validate(write(tmp_path / "d", DOCUMENTS), vocab_size=10)
    assert (index.num_documents, index.num_tokens) == (4, 11)
    assert index.dtype == np.uint16


Damage = Callable[[Path, Path], object]


def put(offset: int, layout: str, *values: int | bytes) -> Damage:
    """Overwrite the index at `offset`."""

    def damage(_: Path, idx: Path) -> None:
        content = bytearray(idx.read_bytes())
        struct.pack_into(layout, content, offset, *values)
        idx.write_bytes(content)

    return damage


def cut_idx(keep: int) -> Damage:
    return lambda _, idx: idx.write_bytes(idx.read_bytes()[:keep])


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


# The index of DOCUMENTS: header 34, lengths at 34, pointers at 50, boundaries at 82, end at 122.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no bin": (lambda b, i: b.unlink(), ".bin: cannot read: No such file"),
    "no idx": (lambda b, i: i.unlink(), ".idx: cannot read: No such file"),
    "bin is a directory": (lambda b, i: make_directory(b), ".bin: cannot read: Is a directory"),
    "idx is a directory": (lambda b, i: make_directory(i), ".idx: cannot read: Is a directory"),
    "bin empty": (lambda b, i: b.write_bytes(b""), ".bin: found an empty file"),
    "idx empty": (cut_idx(0), ".idx: found 0 bytes, expected at least 34"),
    "header cut": (cut_idx(20), ".idx: found 20 bytes, expected at least 34"),
    "lengths cut": (cut_idx(40), ".idx: found 40 bytes, expected 122"),
    "pointers cut": (cut_idx(60), ".idx: found 60 bytes, expected 122"),
    "tail cut": (cut_idx(121), ".idx: found 121 bytes, expected 122"),
    "idx longer": (lambda b, i: i.write_bytes(i.read_bytes() + b"x"), ".idx: found 123 bytes"),
    "multimodal": (lambda b, i: i.write_bytes(i.read_bytes() + bytes(4)), "multimodal"),
    "magic": (put(0, "<9s", b"MMIDIDY\0\0"), ".idx: found magic b'MMIDIDY"),
    "version": (put(9, "<Q", 2), ".idx: found version 2, expected 1"),
    "big-endian": (put(9, ">Q", 1), ".idx: found version 72057594037927936"),
    "dtype 0": (put(17, "<B", 0), ".idx: found dtype code 0 (unknown)"),
    "dtype float": (put(17, "<B", 7), ".idx: found dtype code 7 (a floating-point type)"),
    "dtype 99": (put(17, "<B", 99), ".idx: found dtype code 99"),
    "dtype wider": (put(17, "<B", 4), ".bin: found 22 bytes, expected a multiple of 4"),
    "dtype narrower": (put(17, "<B", 1), "sequence 1: found byte offset 6, expected 3"),
    "sequences 2^40": (put(18, "<Q", 1 << 40), "for 1099511627776 sequences"),
    "sequences 2^64-1": (put(18, "<Q", (1 << 64) - 1), "for 18446744073709551615 sequences"),
    "boundaries 2^40": (put(26, "<Q", 1 << 40), "1099511627776 document boundaries"),
    "length negative": (put(38, "<i", -1), "sequence 1: found length -1"),
    "length larger": (put(38, "<i", 2), "sequence 2: found byte offset 8, expected 10"),
    "last length larger": (put(46, "<i", 3), ".bin: found 22 bytes, expected 24"),
    "pointer negative": (put(58, "<q", -6), "sequence 1: found byte offset -6, expected 6"),
    "pointers not monotone": (put(66, "<q", 2), "sequence 2: found byte offset 2, expected 8"),
    "pointer beyond": (put(74, "<q", 1 << 50), "sequence 3: found byte offset 1125899906842624"),
    "first pointer": (put(50, "<q", 2), "sequence 0: found byte offset 2, expected 0"),
    "documents start": (put(82, "<q", 1), "boundaries from 1 to 4, expected from 0 to 4"),
    "documents end": (put(114, "<q", 3), "boundaries from 0 to 3, expected from 0 to 4"),
    "documents decrease": (put(90, "<q", 3), "document 1: found boundaries 3 and 2"),
    "document beyond": (put(98, "<q", 9), "document 2: found boundaries 9 and 3"),
    "document negative": (put(90, "<q", -1), "document 0: found boundaries 0 and -1"),
    "bin shorter": (lambda b, i: os.truncate(b, 20), ".bin: found 20 bytes, expected 22"),
    "bin longer": (lambda b, i: b.write_bytes(b.read_bytes() + bytes(2)), ".bin: found 24 bytes"),
    "bin odd": (lambda b, i: os.truncate(b, 21), ".bin: found 21 bytes, expected a multiple"),
    "token too large": (
        lambda b, i: b.write_bytes(b.read_bytes()[:8] + struct.pack("<H", 10) + bytes(12)),
        ".bin: token 4: found id 10, expected 0 to 9",
    ),
}


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(
    tmp_path: Path, case: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    write(tmp_path / "d", DOCUMENTS)
    damage, message = DAMAGES[case]
    damage(tmp_path / "d.bin", tmp_path / "d.idx")
    with pytest.raises(DataError) as caught:
        validate(tmp_path / "d", vocab_size=10)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("sequences", "boundaries"), [(0, 0), (0, 1), (0, 2), (3, 1)])
def test_no_documents(tmp_path: Path, sequences: int, boundaries: int) -> None:
    body = bytes(12 * sequences + 8 * boundaries)
    header = indexed.HEADER.pack(indexed.MAGIC, 1, 8, sequences, boundaries)
    (tmp_path / "d.idx").write_bytes(header + body)
    (tmp_path / "d.bin").write_bytes(b"")
    with pytest.raises(DataError, match=f"found {sequences} sequences and {boundaries} document"):
        read_index(tmp_path / "d")


def test_negative_token(tmp_path: Path) -> None:
    write(tmp_path / "d", [[1, 2], [3, -7, 4]], np.int32)
    validate(tmp_path / "d")
    with pytest.raises(DataError, match="token 3: found id -7, expected 0 to 9"):
        validate(tmp_path / "d", vocab_size=10)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([70000], [1], "from 70000 to 70000, expected 0 to 65535"),
        ([-1], [1], "from -1 to -1, expected 0 to 65535"),
        ([0.5], [1], "float64 tokens, expected integers"),
        ([1, 2], [1], "1 tokens in all for 2"),
        ([1, 2], [2, 0], "lengths from 1"),
        ([1, 2], [3, -1], "lengths from 1"),
        ([], [0], "lengths from 1"),
    ],
)
def test_writer_refuses_and_leaves_nothing(
    tmp_path: Path, tokens: list, lengths: list[int], message: str
) -> None:
    with (
        pytest.raises(DataError, match=message),
        IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer,
    ):
        writer.add_document([1])
        writer.add_documents(tokens, lengths)
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_float_dtypes_and_no_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found float32, expected one of uint8"):
        IndexedDatasetWriter(tmp_path / "d", np.float32)
    with (
        pytest.raises(DataError, match="no documents"),
        IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer,
    ):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([1])
        assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing_call", range(1, 8))
def test_failure_at_any_step_of_finish_never_leaves_a_dataset(
    tmp_path: Path, failing_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an old dataset too: what is left is the old one, whole, or none that can be read."""
    old = contents(write(tmp_path / "d", [[1, 2]]))
    calls = 0

    def failing(name: str) -> Callable:
        real = getattr(os, name)

        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == failing_call:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        return call

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, failing(name))
    error = None
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document([7, 8, 9])
        try:
            writer.finish()
        except DataError as caught:
            error = caught
    monkeypatch.undo()
    assert error is not None and "No space left" in str(error)
    new = ([7, 8, 9], [1, 2])
    try:
        index = validate(tmp_path / "d")
    except DataError:
        assert not (tmp_path / "d.idx").exists()
    else:
        tokens = np.fromfile(tmp_path / "d.bin", dtype=index.dtype).tolist()
        assert tokens in new and (tokens == [7, 8, 9] or contents(tmp_path / "d") == old)
