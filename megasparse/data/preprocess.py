"""JSONL to tokens: many processes, the order of the input, bounded memory, no half result.

The parent reads lines and hands out batches of about `BATCH_BYTES`; workers parse and tokenize;
the parent writes in the order of the input, so that any number of workers gives the same bytes.
The workers never get far ahead of the writing, and one that dies ends the run (`workers.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megasparse.data.file_errors import read_error
from megasparse.data.indexed import optimal_dtype
from megasparse.data.indexed_writer import IndexedDatasetWriter, Provenance
from megasparse.data.jsonl import parse_line, read_lines
from megasparse.data.sidecar import Sidecar, bin_path, idx_path, sidecar_path
from megasparse.data.special_tokens import BY_THE_FILES, TokenOptions
from megasparse.data.tokenizer import Tokenizer, begin, load_tokenizer
from megasparse.data.workers import ordered_map
from megasparse.errors import DataError
from megasparse.progress import progress

BATCH_BYTES = 1 << 18


@dataclass(frozen=True)
class PreprocessOptions:
    """What `preprocess` is asked for; the names are those of Megatron's flags.

    Attributes:
        input: JSONL files, read in this order.
        output_prefix: `<output_prefix>_<key>_document` is the dataset of each key.
        tokenizer_model: path as `load_tokenizer` takes it.
        tokenizer_type: to insist on a type; inferred when None.
        tokens: which tokens begin and end a document.
        json_keys: keys of the texts.
        append_eod: end each document with the tokenizer's end-of-document token.
        workers: number of processes that tokenize; 1 does it in this process.
        overwrite: replace existing outputs.
    """

    input: tuple[Path, ...]
    output_prefix: str
    tokenizer_model: Path
    tokenizer_type: str | None = None
    tokens: TokenOptions = BY_THE_FILES
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = True
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class PreprocessSummary:
    """One dataset that `preprocess` wrote; `num_empty` documents had no token and were left out."""

    prefix: str
    sidecar: Sidecar
    num_empty: int


@dataclass(frozen=True)
class _Batch:
    """Lines of one file: (number, bytes) each."""

    path: str
    lines: list[tuple[int, bytes]]
    num_bytes: int


@dataclass(frozen=True)
class _Tokens:
    """The tokenized documents of one batch under one key."""

    tokens: np.ndarray  # (T,) in the dataset's dtype
    lengths: list[int]
    num_empty: int


_Work = Callable[[_Batch], tuple[int, list[_Tokens]]]


def dataset_prefix(output_prefix: str, key: str) -> str:
    """Megatron's name of the dataset of one key."""
    return f"{output_prefix}_{key}_document"


def preprocess(options: PreprocessOptions) -> list[PreprocessSummary]:
    """Tokenize JSONL files into one indexed dataset a key.

    Raises:
        DataError: an input or the tokenizer is bad (with file and line), an output exists, there
            is no document, a worker died, or the output cannot be written. Nothing that looks
            like a dataset is left then.
    """
    total = _check(options)
    tokenizer = load_tokenizer(
        options.tokenizer_model, options.tokenizer_type, options=options.tokens
    )
    empty = dict.fromkeys(options.json_keys, 0)
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(
                IndexedDatasetWriter(
                    dataset_prefix(options.output_prefix, key), optimal_dtype(tokenizer.vocab_size)
                )
            )
            for key in options.json_keys
        }
        bar = stack.enter_context(progress(desc="tokenizing", total=total, unit="B"))
        results = stack.enter_context(_tokenized(options, tokenizer))
        for num_bytes, by_key in results:
            for key, result in zip(options.json_keys, by_key):
                writers[key].add_documents(result.tokens, result.lengths)
                empty[key] += result.num_empty
            bar.update(num_bytes)
        for key, writer in writers.items():
            if writer.num_documents == 0:
                names = ", ".join(map(str, options.input))
                raise DataError(
                    f"{names}: found no documents with text under {key!r} ({empty[key]} empty)"
                )
        provenance = Provenance(
            tokenizer, options.append_eod, ", ".join(path.name for path in options.input)
        )
        summaries = []
        for key, writer in writers.items():
            sidecar = writer.finish(provenance)
            assert sidecar is not None  # a provenance was given
            summaries.append(PreprocessSummary(writer.prefix, sidecar, empty[key]))
    return summaries


def _check(options: PreprocessOptions) -> int:
    """Find what can be found wrong before any work; returns the number of bytes to read."""
    if options.workers < 1:
        raise DataError(f"workers: found {options.workers}, expected at least 1")
    if not options.json_keys or len(set(options.json_keys)) != len(options.json_keys):
        raise DataError(f"json_keys: found {list(options.json_keys)}, expected different keys")
    total = 0
    for path in options.input:
        try:
            with open(path, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise read_error(path, error) from error
        if size == 0:
            raise DataError(f"{path}: found an empty file, expected JSON lines")
        total += size
    for key in options.json_keys:
        prefix = dataset_prefix(options.output_prefix, key)
        for path in (bin_path(prefix), idx_path(prefix), sidecar_path(prefix)):
            if path.exists() and not options.overwrite:
                raise DataError(f"{path}: exists already; --overwrite replaces it")
    return total


def _batches(paths: Sequence[Path]) -> Iterator[_Batch]:
    for path in paths:
        lines: list[tuple[int, bytes]] = []
        num_bytes = 0
        for number, line in read_lines(path):
            lines.append((number, line))
            num_bytes += len(line) + 1
            if num_bytes >= BATCH_BYTES:
                yield _Batch(str(path), lines, num_bytes)
                lines, num_bytes = [], 0
        if lines:
            yield _Batch(str(path), lines, num_bytes)


def _tokenize(
    batch: _Batch, keys: Sequence[str], tokenizer: Tokenizer, append_eod: bool
) -> list[_Tokens]:
    """Parse and tokenize a batch; one result a key."""
    ids: list[list[int]] = [[] for _ in keys]
    lengths: list[list[int]] = [[] for _ in keys]
    empty = [0] * len(keys)
    before, after = begin(tokenizer), [tokenizer.eod] if append_eod else []
    for number, line in batch.lines:
        where = f"{batch.path}:{number}"
        for slot, text in enumerate(parse_line(line, keys, where)):
            document = _encode(tokenizer, text, where)
            if not document:
                empty[slot] += 1
                continue
            ids[slot] += [*before, *document, *after]
            lengths[slot].append(len(before) + len(document) + len(after))
    dtype = optimal_dtype(tokenizer.vocab_size)
    return [
        _Tokens(np.array(ids[slot], dtype=dtype), lengths[slot], empty[slot])
        for slot in range(len(keys))
    ]


def _encode(tokenizer: Tokenizer, text: str, where: str) -> list[int]:
    try:
        return tokenizer.encode(text) if text else []
    except Exception as error:  # the tokenizer libraries raise plain exceptions
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where}: the tokenizer cannot encode this text: {reason}") from error


@contextmanager
def _tokenized(
    options: PreprocessOptions, tokenizer: Tokenizer
) -> Iterator[Iterator[tuple[int, list[_Tokens]]]]:
    """Bytes read and results of each batch, in the order of the input."""
    batches = _batches(options.input)
    if options.workers == 1:
        yield map(_work_with(options, tokenizer), batches)
        return
    arguments = (options, tokenizer.digest)
    with ordered_map(_start_worker, arguments, options.workers) as run:
        yield run(batches)


def _work_with(options: PreprocessOptions, tokenizer: Tokenizer) -> _Work:
    def work(batch: _Batch) -> tuple[int, list[_Tokens]]:
        tokens = _tokenize(batch, options.json_keys, tokenizer, options.append_eod)
        return batch.num_bytes, tokens

    return work


def _start_worker(options: PreprocessOptions, digest: str) -> _Work:
    """What a worker process does with a batch; the parent has just probed the tokenizer."""
    tokenizer = load_tokenizer(
        options.tokenizer_model, options.tokenizer_type, probe=False, options=options.tokens
    )
    if tokenizer.digest != digest:
        raise DataError(f"{options.tokenizer_model}: changed while it was in use")
    return _work_with(options, tokenizer)
