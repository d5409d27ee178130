"""A small corpus of real sources and a tokenizer trained on it, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasparse.data.corpus import write_corpus
from megasparse.data.jsonl import read_texts
from megasparse.data.tokenizers.tokenizer import train_sentencepiece


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 kB of the standard library as JSONL."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_corpus(path, 300_000)
    return path


@pytest.fixture(scope="session")
def texts(corpus: Path) -> list[str]:
    """The corpus's documents."""
    return list(read_texts(corpus))


@pytest.fixture(scope="session")
def model_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 600 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sentencepiece((t[:2000] for t in texts), 600))
    return path
