"""Text to tokens: many processes, the order of the input, bounded memory, no half result.

The parent reads records (`inputs.py`) and hands out batches of about `BATCH_BYTES`; workers parse
and tokenize; the parent writes in the order of the input, so that any number of workers gives the
same bytes. The workers never get far ahead of the writing, and one that dies ends the run
(`workers.py`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import megasparse
from megasparse.atomic_files import write_json
from megasparse.data.indexed import optimal_dtype
from megasparse.data.indexed_writer import IndexedDatasetWriter, Provenance
from megasparse.data.inputs import STDIN, Payload, Source, find_inputs, read_records
from megasparse.data.jsonl import texts_of
from megasparse.data.sidecar import Sidecar, bin_path, idx_path, sidecar_path
from megasparse.data.special_tokens import BY_THE_FILES, TokenOptions
from megasparse.data.tokenizer import Tokenizer, begin, load_tokenizer, token_rules
from megasparse.data.workers import ordered_map
from megasparse.errors import DataError
from megasparse.progress import progress

BATCH_BYTES = 1 << 18
ERROR, SKIP = "error", "skip"
ON_BAD_LINE = (ERROR, SKIP)
# Places of bad lines that are told.
FIRST_BAD = 10


@dataclass(frozen=True)
class PreprocessOptions:
    """What `preprocess` is asked for; the names are those of Megatron's flags.

    Attributes:
        input: files, folders and pipes, read in this order; `-` is standard input.
        output_prefix: `<output_prefix>_<key>_document` is the dataset of each key.
        tokenizer_model: path as `load_tokenizer` takes it.
        tokenizer_type: to insist on a type; inferred when None.
        tokens: which tokens begin and end a document.
        json_keys: keys of the texts.
        append_eod: end each document with the tokenizer's end-of-document token.
        workers: number of processes that tokenize; 1 does it in this process.
        overwrite: replace existing outputs.
        on_bad_line: "error" ends the work at the first line (or row) that holds no text, "skip"
            leaves it out and counts it.
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
    on_bad_line: str = ERROR


@dataclass
class BadLines:
    """Lines that were skipped: how many of each input, and the first ones with their places."""

    of_input: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PreprocessSummary:
    """One dataset that `preprocess` wrote.

    Attributes:
        num_empty: documents that had no token and were left out.
        bad: lines that were skipped, the same for all datasets.
    """

    prefix: str
    sidecar: Sidecar
    num_empty: int
    bad: BadLines


@dataclass(frozen=True)
class _Batch:
    """Records of one input: (number, payload) each; `num_bytes` of the input are behind them."""

    path: str
    lines: list[tuple[int, Payload]]
    num_bytes: int


@dataclass(frozen=True)
class _Tokens:
    """The tokenized documents of one batch under one key."""

    tokens: np.ndarray  # (T,) in the dataset's dtype
    lengths: list[int]
    num_empty: int


@dataclass(frozen=True)
class _Result:
    """What became of a batch: tokens by key, and why records hold no text (the first of them)."""

    path: str
    num_bytes: int
    tokens: list[_Tokens]
    num_bad: int
    first_bad: list[str]


_Work = Callable[[_Batch], _Result]


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
    sources = _check(options)
    tokenizer = load_tokenizer(
        options.tokenizer_model, options.tokenizer_type, options=options.tokens
    )
    empty = dict.fromkeys(options.json_keys, 0)
    bad = BadLines()
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(
                IndexedDatasetWriter(
                    dataset_prefix(options.output_prefix, key), optimal_dtype(tokenizer.vocab_size)
                )
            )
            for key in options.json_keys
        }
        sizes = [source.size for source in sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        bar = stack.enter_context(progress(desc="tokenizing", total=total, unit="B"))
        for result in stack.enter_context(_tokenized(options, tokenizer, sources)):
            for key, tokens in zip(options.json_keys, result.tokens):
                writers[key].add_documents(tokens.tokens, tokens.lengths)
                empty[key] += tokens.num_empty
            if result.num_bad:
                bad.of_input[result.path] += result.num_bad
                bad.first += result.first_bad[: FIRST_BAD - len(bad.first)]
            bar.update(result.num_bytes)
        for key, writer in writers.items():
            if writer.num_documents == 0:
                names = ", ".join(map(str, options.input))
                skipped = f", {bad.of_input.total()} bad lines skipped" if bad.first else ""
                raise DataError(
                    f"{names}: found no documents with text under {key!r} ({empty[key]} empty"
                    f"{skipped})"
                )
        provenance = Provenance(
            tokenizer, options.append_eod, ", ".join(path.name for path in options.input)
        )
        summaries = []
        for key, writer in writers.items():
            sidecar = writer.finish(provenance)
            assert sidecar is not None  # a provenance was given
            summaries.append(PreprocessSummary(writer.prefix, sidecar, empty[key], bad))
        _write_manifest(options, tokenizer, sources, summaries)
    return summaries


def manifest_path(output_prefix: str) -> Path:
    """Name of the file that says what was read."""
    return Path(f"{output_prefix}_manifest.json")


def _write_manifest(
    options: PreprocessOptions,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    summaries: Sequence[PreprocessSummary],
) -> None:
    bad = summaries[0].bad
    inputs = [
        {
            "path": str(s.path if s.path == STDIN else s.path.absolute()),
            "kind": s.kind,
            "bytes": s.num_bytes,
            "sha256": s.sha256,
            "records": s.records,
            "bad": bad.of_input[str(s.path)],
        }
        for s in sources
    ]
    tokens = {"type": tokenizer.tokenizer_type, "sha256": tokenizer.digest}
    content = {
        "format": 1,
        "inputs": inputs,
        "bad_lines": {"count": bad.of_input.total(), "first": bad.first},
        "tokenizer": {"file": str(options.tokenizer_model.absolute()), **tokens},
        "tokens": {**token_rules(tokenizer), "append_eod": options.append_eod},
        "datasets": {
            s.prefix: {"documents": s.sidecar.num_documents, "empty": s.num_empty}
            for s in summaries
        },
        "megasparse": megasparse.__version__,
    }
    write_json(manifest_path(options.output_prefix), content, indent=1)


def _check(options: PreprocessOptions) -> list[Source]:
    """Find what can be found wrong before any work; the inputs."""
    if options.workers < 1:
        raise DataError(f"workers: found {options.workers}, expected at least 1")
    if options.on_bad_line not in ON_BAD_LINE:
        expected = " or ".join(ON_BAD_LINE)
        raise DataError(f"on_bad_line: found {options.on_bad_line!r}, expected {expected}")
    if not options.json_keys or len(set(options.json_keys)) != len(options.json_keys):
        raise DataError(f"json_keys: found {list(options.json_keys)}, expected different keys")
    sources = find_inputs(options.input)
    outputs = [manifest_path(options.output_prefix)]
    for key in options.json_keys:
        prefix = dataset_prefix(options.output_prefix, key)
        outputs += [bin_path(prefix), idx_path(prefix), sidecar_path(prefix)]
    for path in outputs:
        if path.exists() and not options.overwrite:
            raise DataError(f"{path}: exists already; --overwrite replaces it")
    return sources


def _batches(sources: Sequence[Source], keys: Sequence[str]) -> Iterator[_Batch]:
    for source in sources:
        lines: list[tuple[int, Payload]] = []
        size = told = 0
        for number, payload in read_records(source, keys):
            lines.append((number, payload))
            size += _size(payload)
            if size >= BATCH_BYTES:
                yield _Batch(str(source.path), lines, source.num_bytes - told)
                lines, size, told = [], 0, source.num_bytes
        if lines or source.num_bytes > told:
            yield _Batch(str(source.path), lines, source.num_bytes - told)


def _size(payload: Payload) -> int:
    if isinstance(payload, tuple):
        return sum(len(value) for value in payload if isinstance(value, str)) + 1
    return len(payload) + 1 if isinstance(payload, bytes) else 1


def _tokenize(batch: _Batch, options: PreprocessOptions, tokenizer: Tokenizer) -> _Result:
    """Parse and tokenize a batch; one `_Tokens` a key."""
    keys = options.json_keys
    ids: list[list[int]] = [[] for _ in keys]
    lengths: list[list[int]] = [[] for _ in keys]
    empty, bad = [0] * len(keys), 0
    first_bad: list[str] = []
    before, after = begin(tokenizer), [tokenizer.eod] if options.append_eod else []
    for number, payload in batch.lines:
        where = f"{batch.path}:{number}"
        try:
            texts = texts_of(payload, keys, where)
        except DataError as error:
            if options.on_bad_line == ERROR:
                raise
            bad += 1
            if len(first_bad) < FIRST_BAD:
                first_bad.append(str(error))
            continue
        for slot, text in enumerate(texts):
            document = _encode(tokenizer, text, where)
            if not document:
                empty[slot] += 1
                continue
            ids[slot] += before
            ids[slot] += document
            ids[slot] += after
            lengths[slot].append(len(before) + len(document) + len(after))
    dtype = optimal_dtype(tokenizer.vocab_size)
    tokens = [
        _Tokens(np.array(ids[slot], dtype=dtype), lengths[slot], empty[slot])
        for slot in range(len(keys))
    ]
    return _Result(batch.path, batch.num_bytes, tokens, bad, first_bad)


def _encode(tokenizer: Tokenizer, text: str, where: str) -> list[int]:
    try:
        return tokenizer.encode(text) if text else []
    except Exception as error:  # the tokenizer libraries raise plain exceptions
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where}: the tokenizer cannot encode this text: {reason}") from error


@contextmanager
def _tokenized(
    options: PreprocessOptions, tokenizer: Tokenizer, sources: Sequence[Source]
) -> Iterator[Iterator[_Result]]:
    """What became of each batch, in the order of the input."""
    batches = _batches(sources, options.json_keys)
    if options.workers == 1:
        yield map(_work_with(options, tokenizer), batches)
        return
    arguments = (options, tokenizer.digest)
    with ordered_map(_start_worker, arguments, options.workers) as run:
        yield run(batches)


def _work_with(options: PreprocessOptions, tokenizer: Tokenizer) -> _Work:
    return functools.partial(_tokenize, options=options, tokenizer=tokenizer)


def _start_worker(options: PreprocessOptions, digest: str) -> _Work:
    """What a worker process does with a batch; the parent has just probed the tokenizer."""
    tokenizer = load_tokenizer(
        options.tokenizer_model, options.tokenizer_type, probe=False, options=options.tokens
    )
    if tokenizer.digest != digest:
        raise DataError(f"{options.tokenizer_model}: changed while it was in use")
    return _work_with(options, tokenizer)
