"""GPT-2's vocab.json and merges.txt as the one tokenizer.json that everything else reads."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megasparse.data.file_errors import read_error
from megasparse.errors import DataError
from megasparse.input_files import read_regular


def bpe_tokenizer_json(vocab_file: Path, merge_file: Path) -> str:
    """The tokenizer.json of a byte-level BPE (Megatron's GPT2BPETokenizer).

    Args:
        vocab_file: JSON, token -> id.
        merge_file: a pair of tokens a line, after an optional `#version` line.

    Raises:
        DataError: a file is missing or is not of that form.
    """
    vocab = _vocabulary(vocab_file)
    merges = _merges(merge_file)
    for pair in merges:
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise DataError(f"{merge_file}: {token!r} is no token of {vocab_file}")
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON: {error}") from None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or any(type(i) is not int or i < 0 for i in ids) or len(set(ids)) != len(ids):
        raise DataError(f"{path}: expected a JSON object of tokens with ids, each of its own")
    return vocab


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        words = line.rstrip("\r").split(" ")
        if len(words) != 2:
            raise DataError(f"{path}: line {number} is {line!r}, expected two tokens")
        merges.append((words[0], words[1]))
    return merges


def _text(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8")
    except OSError as error:
        raise read_error(path, error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8: {error}") from None
