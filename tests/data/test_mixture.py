"""What a dataset of a blend can give: nothing that was asked for vanishes without a word."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from megasparse.config import load_config, resolve
from megasparse.data.check import check_data
from megasparse.data.indexed_writer import IndexedDatasetWriter, Provenance
from megasparse.data.mixture import describe, shares
from megasparse.data.tokenizers.tokenizer import NullTokenizer
from megasparse.errors import ConfigError, DataError

BASE = ["--seq-length", "64", "--global-batch-size", "4", "--train-iters", "25"]
BASE += ["--vocab-size", "128", "--eval-iters", "0"]


def dataset(prefix: Path, *lengths: int, first: int = 1) -> str:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.arange(first, first + length) % 128)
        writer.finish()
    return str(prefix)


@pytest.fixture
def big(tmp_path: Path) -> str:
    return dataset(tmp_path / "big", *[100] * 100)


def checked(*flags: str):
    config = resolve(load_config([*BASE, *flags]), 1)
    return config, check_data(config)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("tokens", [1, 19, 64])
def test_a_source_without_a_sample_is_an_error(
    tmp_path: Path, big: str, tokens: int, weighted: bool
) -> None:
    small = dataset(tmp_path / "small", tokens)
    words = ["0.5", big, "0.5", small] if weighted else [big, small]
    with pytest.raises(DataError) as caught:
        checked("--split", "1", "--data-path", *words)
    text = str(caught.value)
    assert f"{small} holds {tokens} tokens in 1 documents for training" in text
    assert "leave it out" in text and "--seq-length" in text and "\n" not in text


def test_one_sample_is_enough(tmp_path: Path, big: str) -> None:
    small = dataset(tmp_path / "small", 65)
    config, found = checked("--split", "1", "--data-path", "0.5", big, "0.5", small)
    assert [share.samples for share in shares(found.of_split("train"), "train", config)] == [156, 1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split", "90,10,0"], "validation"),
        (["--split", "90,0,10"], "testing"),
        (["--eval-iters", "1"], "validation"),  # of the default split
    ],
)
def test_a_source_without_documents_in_a_split(
    tmp_path: Path, big: str, flags: list[str], words: str
) -> None:
    one = dataset(tmp_path / "one", 500)  # a document cannot be divided
    with pytest.raises(DataError, match=f"one holds 0 tokens in 0 documents for {words}.*--split"):
        checked(*flags, "--data-path", big, one)


def test_nobody_asked_for_the_rest_of_the_default_split(tmp_path: Path, big: str, caplog) -> None:
    one = dataset(tmp_path / "one", 500)
    with caplog.at_level(logging.WARNING, "megasparse"):
        checked("--data-path", big, one)
    assert "one holds 0 tokens in 0 documents for validation" in caplog.text


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_sources_of_each_split_are_held_to_it(tmp_path: Path, big: str, split: str) -> None:
    small = dataset(tmp_path / "small", 30)
    with pytest.raises(DataError, match="small holds 30 tokens"):
        checked("--train-data-path", big, f"--{split}-data-path", big, small)


def test_a_weight_that_rounds_to_nothing(tmp_path: Path, big: str) -> None:
    other = dataset(tmp_path / "other", *[100] * 100, first=2)
    for weight in ("1e-9", "1e-320"):
        with pytest.raises(DataError, match="other: its share.*rounds to none of 312 samples"):
            checked("--split", "1", "--data-path", "1", big, weight, other)
    checked("--split", "1", "--data-path", "1", big, "0.01", other)
    with pytest.raises(ConfigError, match="sum is not finite"):
        checked("--split", "1", "--data-path", "1e308", big, "1e308", other)


def test_the_log_says_what_was_asked_and_what_is_given(tmp_path: Path, big: str) -> None:
    other = dataset(tmp_path / "other", *[65] * 2, first=2)
    config, found = checked("--split", "1", "--data-path", "3", big, "1", other)
    lines = describe(shares(found.of_split("train"), "train", config), [76, 24], "train")
    assert lines[0] == "training data: 100 samples"
    assert lines[1] == (f"  {big}: asked 75.00%, given 76.00%: 76 samples, 0.49 epochs of 156")
    assert lines[2].endswith("asked 25.00%, given 24.00%: 24 samples, 12.00 epochs of 2")


def test_the_same_file_is_told(tmp_path: Path, big: str, caplog) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(f"{big}{suffix}")
        (tmp_path / f"copy{suffix}").write_bytes(Path(f"{big}{suffix}").read_bytes())
    with pytest.raises(ConfigError, match="link twice"):
        checked("--split", "1", "--data-path", big, str(tmp_path / "link"))
    with caplog.at_level(logging.WARNING, "megasparse"):
        checked("--split", "1", "--data-path", big, str(tmp_path / "copy"))
    assert f"{big} and {tmp_path / 'copy'} seem to hold the same tokens" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "megasparse"):
        checked("--train-data-path", big, "--valid-data-path", big)
    assert f"{big} (train) and {big} (valid)" in caplog.text


def test_a_run_on_ids_takes_the_end_of_documents_from_the_datasets(tmp_path: Path) -> None:
    prefixes = []
    for size in (100, 101):
        prefixes.append(str(tmp_path / str(size)))
        with IndexedDatasetWriter(prefixes[-1], np.uint16) as writer:
            writer.add_document(np.arange(size).repeat(7))
            writer.finish(Provenance(NullTokenizer(size), True, "test"))
    flags = ["--split", "1", "--data-path"]
    assert checked(*flags, prefixes[0])[1].eod == 99
    with pytest.raises(DataError, match="99 in .* and 100 in"):
        checked(*flags, *prefixes)
