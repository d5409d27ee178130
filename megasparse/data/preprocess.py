"""Text or conversations to tokens: many processes, the order of the input, bounded memory, no half
result.

The parent reads records (`inputs.py`) and hands out batches of about `BATCH_BYTES`; workers parse
and tokenize; the parent writes in the order of the input, so that any number of workers gives the
same bytes. The workers never get far ahead of the writing, and one that dies ends the run
(`workers.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from megasparse.data.documents import (
    Conversations,
    Documents,
    TextDocuments,
    TokenizerFailure,
    template_of,
)
from megasparse.data.indexed import optimal_dtype
from megasparse.data.indexed_writer import IndexedDatasetWriter, Provenance
from megasparse.data.inputs import Payload, Source, find_inputs, read_records
from megasparse.data.manifest import (
    ERROR,
    ON_BAD_LINE,
    BadLines,
    PreprocessOptions,
    PreprocessSummary,
    manifest_path,
    write_manifest,
)
from megasparse.data.sidecar import bin_path, idx_path, mask_path, sidecar_path
from megasparse.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megasparse.data.workers import ordered_map
from megasparse.errors import DataError
from megasparse.progress import progress

BATCH_BYTES = 1 << 18
# Places of bad lines that are told.
FIRST_BAD = 10


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
    answers: np.ndarray | None  # (T,) bool, of conversations


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
    """Tokenize inputs into one indexed dataset a key.

    Raises:
        DataError: an input or the tokenizer is bad (with file and line), an output exists, there
            is no document, a worker died, or the output cannot be written. Nothing that looks
            like a dataset is left then.
    """
    sources = _check(options)
    tokenizer = _load_tokenizer(options)
    documents = _documents(options, tokenizer)
    empty = dict.fromkeys(options.json_keys, 0)
    bad = BadLines()
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(
                IndexedDatasetWriter(
                    dataset_prefix(options.output_prefix, key),
                    optimal_dtype(tokenizer.vocab_size),
                    masked=options.sft,
                )
            )
            for key in options.json_keys
        }
        sizes = [source.size for source in sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        bar = stack.enter_context(progress(desc="tokenizing", total=total, unit="B"))
        for result in stack.enter_context(_tokenized(options, tokenizer, documents, sources)):
            for key, tokens in zip(options.json_keys, result.tokens):
                writers[key].add_documents(tokens.tokens, tokens.lengths, tokens.answers)
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
        template = documents.template
        provenance = Provenance(
            tokenizer,
            options.append_eod and not options.sft,
            ", ".join(path.name for path in options.input),
            None if template is None else template.text,
        )
        summaries = []
        for key, writer in writers.items():
            sidecar = writer.finish(provenance)
            assert sidecar is not None  # a provenance was given
            summaries.append(PreprocessSummary(writer.prefix, sidecar, empty[key], bad))
        write_manifest(options, tokenizer, template, sources, summaries)
    return summaries


def _check(options: PreprocessOptions) -> list[Source]:
    """Find what can be found wrong before any work; the inputs."""
    if options.workers < 1:
        raise DataError(f"workers: found {options.workers}, expected at least 1")
    if options.on_bad_line not in ON_BAD_LINE:
        expected = " or ".join(ON_BAD_LINE)
        raise DataError(f"on_bad_line: found {options.on_bad_line!r}, expected {expected}")
    if not options.json_keys or len(set(options.json_keys)) != len(options.json_keys):
        raise DataError(f"json_keys: found {list(options.json_keys)}, expected different keys")
    if options.sft and len(options.json_keys) != 1:
        raise DataError(f"json_keys: found {list(options.json_keys)}, expected one key with sft")
    if options.chat_template is not None and not options.sft:
        raise DataError("chat_template is given without sft, which it is for")
    sources = find_inputs(options.input)
    outputs = [manifest_path(options.output_prefix)]
    for key in options.json_keys:
        prefix = dataset_prefix(options.output_prefix, key)
        outputs += [bin_path(prefix), idx_path(prefix), sidecar_path(prefix)]
        outputs += [mask_path(prefix)] if options.sft else []
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


def _tokenize(
    batch: _Batch, options: PreprocessOptions, documents: Documents, dtype: np.dtype
) -> _Result:
    """Parse and tokenize a batch; one `_Tokens` a key."""
    keys = options.json_keys
    ids: list[list[int]] = [[] for _ in keys]
    lengths: list[list[int]] = [[] for _ in keys]
    answers: list[list[bool]] = [[] for _ in keys]
    empty, bad = [0] * len(keys), 0
    first_bad: list[str] = []
    for number, payload in batch.lines:
        where = f"{batch.path}:{number}"
        try:
            found = documents.of(payload, where)
        except DataError as error:
            if options.on_bad_line == ERROR or isinstance(error, TokenizerFailure):
                raise
            bad += 1
            if len(first_bad) < FIRST_BAD:
                first_bad.append(str(error))
            continue
        for slot, document in enumerate(found):
            if not document.ids:
                empty[slot] += 1
                continue
            ids[slot] += document.ids
            lengths[slot].append(len(document.ids))
            answers[slot] += document.answers or []
    tokens = [
        _Tokens(
            np.array(ids[slot], dtype=dtype),
            lengths[slot],
            empty[slot],
            np.array(answers[slot], dtype=bool) if options.sft else None,
        )
        for slot in range(len(keys))
    ]
    return _Result(batch.path, batch.num_bytes, tokens, bad, first_bad)


def _load_tokenizer(options: PreprocessOptions, probe: bool = True) -> Tokenizer:
    """The tokenizer; templates are written in control tokens, which it has to parse."""
    tokens = options.tokens
    if options.sft:
        tokens = dataclasses.replace(tokens, parse_special=True)
    return load_tokenizer(
        options.tokenizer_model, options.tokenizer_type, probe=probe, options=tokens
    )


def _documents(options: PreprocessOptions, tokenizer: Tokenizer) -> Documents:
    """What makes documents of records."""
    if not options.sft:
        return TextDocuments(tokenizer, options.json_keys, options.append_eod)
    template = template_of(tokenizer, options.tokenizer_model, options.chat_template)
    control_in_texts = options.tokens.parse_special
    return Conversations(tokenizer, template, options.json_keys[0], control_in_texts)


@contextmanager
def _tokenized(
    options: PreprocessOptions,
    tokenizer: Tokenizer,
    documents: Documents,
    sources: Sequence[Source],
) -> Iterator[Iterator[_Result]]:
    """What became of each batch, in the order of the input."""
    batches = _batches(sources, options.json_keys)
    if options.workers == 1:
        yield map(_work_with(options, tokenizer, documents), batches)
        return
    template = documents.template
    arguments = (options, tokenizer.digest, None if template is None else template.digest)
    with ordered_map(_start_worker, arguments, options.workers) as run:
        yield run(batches)


def _work_with(options: PreprocessOptions, tokenizer: Tokenizer, documents: Documents) -> _Work:
    dtype = optimal_dtype(tokenizer.vocab_size)
    return functools.partial(_tokenize, options=options, documents=documents, dtype=dtype)


def _start_worker(options: PreprocessOptions, digest: str, template: str | None) -> _Work:
    """What a worker process does with a batch; the parent has just probed the tokenizer."""
    tokenizer = _load_tokenizer(options, probe=False)
    documents = _documents(options, tokenizer)
    mine = documents.template
    if tokenizer.digest != digest or (mine is not None and mine.digest != template):
        raise DataError(f"{options.tokenizer_model}: changed while it was in use")
    return _work_with(options, tokenizer, documents)
