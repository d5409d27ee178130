"""GPT-2's two files give the ids that transformers' GPT-2 tokenizer gives."""

from __future__ import annotations

import json

import pytest

from megasparse.data.tokenizers.bpe_files import bpe_tokenizer_json
from megasparse.data.tokenizers.tokenizer import HuggingFaceTokenizer
from megasparse.errors import DataError


def _files(folder):
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("Ċ", "Ċ")]
    tokens = [*letters, *map("".join, merges), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    return folder / "vocab.json", folder / "merges.txt"


def test_ids_are_those_of_transformers(tmp_path):
    from transformers import GPT2Tokenizer

    vocab, merges = _files(tmp_path)
    ours = HuggingFaceTokenizer(bpe_tokenizer_json(vocab, merges).encode(), "made")
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    for text in (
        "the land and\n\n the sea",
        "  naïve — 数",
        "def f(x):\n\treturn x's",
        "#version: 1",
    ):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.eod_piece == "<|endoftext|>" and ours.eod not in ours.encode("<|endoftext|>")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("vocab.json", "[1]", "expected a JSON object"),
        ("vocab.json", '{"a": 1, "b": 1}', "each of its own"),
        ("vocab.json", "{", "no JSON"),
        ("merges.txt", "t h e", "line 1 is 't h e', expected two tokens"),
        ("merges.txt", "t zz", "'zz' is no token"),
        ("merges.txt", None, "cannot read"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, words):
    vocab, merges = _files(tmp_path)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}.*{words}"):
        bpe_tokenizer_json(vocab, merges)
