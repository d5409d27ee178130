"""Throughput of tools/preprocess_data.py beside the logic of Megatron's preprocess_data.py.

    python -m tools.bench.preprocess --workers 2 --output tools/results/preprocess-cpu-DATE.md

Megatron's logic is: a pool of processes takes 32 lines at a time, parses and tokenizes each, and
the parent adds one document after the other to megatron-core's IndexedDatasetBuilder. Here it gets
the same tokenizer objects. Both sides run as commands, in turns, round after round, on the same
file and on a small one, and their .bin and .idx must be equal byte by byte. CPU seconds are those
of all processes of a command: on a machine that others use too they say more than the clock. Rates
without start are of the difference between the two files.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megasparse.atomic_files import replacing, write_json, write_text
from megasparse.cli import guarded, markdown_table
from megasparse.data.corpus import write_corpus
from megasparse.data.indexed import optimal_dtype
from megasparse.data.jsonl import read_texts
from megasparse.data.tokenizers.spm_json import tokenizer_json
from megasparse.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megasparse.errors import DataError

CHUNK = 32  # lines at a time, as in Megatron
MEGATRON, HERE = "Megatron's logic", "megasparse"
AS_MEGATRON = "--as-megatron"
ROOT = Path(__file__).parents[2]
_tokenizer: Tokenizer


def _start(model: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(model, probe=False)


def _encode(line: bytes) -> tuple[list[int], int]:
    ids = _tokenizer.encode(json.loads(line)["text"])
    if ids:
        ids.append(_tokenizer.eod)
    return ids, len(line)


def as_megatron(corpus: Path, model: Path, prefix: str, workers: int) -> None:
    """Megatron's logic, with the tokenizer of `load_tokenizer`."""
    dtype: Any = optimal_dtype(load_tokenizer(model).vocab_size).type
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=dtype)
    with (
        open(corpus, "rb") as stream,
        multiprocessing.Pool(workers, initializer=_start, initargs=(str(model),)) as pool,
    ):
        for ids, _ in pool.imap(_encode, stream, CHUNK):
            if ids:
                builder.add_document(np.asarray(ids), [len(ids)])
    builder.finalize(f"{prefix}_text_document.idx")


def commands(corpus: Path, model: Path, prefix: str, workers: int) -> dict[str, list[str]]:
    """What each side is run by."""
    here = ["--input", str(corpus), "--output-prefix", prefix, "--tokenizer-model", str(model)]
    here += ["--workers", str(workers), "--overwrite", "--no-add-bos"]
    theirs = [str(corpus), str(model), prefix, str(workers)]
    return {
        MEGATRON: [sys.executable, "-m", "tools.bench.preprocess", AS_MEGATRON, *theirs],
        HERE: [sys.executable, "tools/preprocess_data.py", *here],
    }


def make_inputs(folder: Path, max_bytes: int, vocab_size: int) -> tuple[Path, dict[str, Path]]:
    """A corpus of the standard library's sources, and tokenizers of both kinds."""
    corpus = folder / "corpus.jsonl"
    write_corpus(corpus, max_bytes)
    sample = [text[:2000] for text in read_texts(corpus)]
    model = train_sentencepiece(sample, vocab_size)
    pieces = folder / "tokenizer.model"
    with replacing(pieces) as stream:
        stream.write(model)
    found = {"SentencePiece": pieces}
    content = tokenizer_json(model)
    if content is not None:
        (folder / "json").mkdir()
        found["tokenizer.json"] = folder / "json" / "tokenizer.json"
        write_json(found["tokenizer.json"], content)
    return corpus, found


def measure(
    corpora: Sequence[Path], models: dict[str, Path], folder: Path, workers: int, rounds: int
) -> list[list[str]]:
    """Rows of the table.

    Args:
        corpora: a small one and the one to measure.

    Raises:
        DataError: a side failed, or the two wrote different bytes.
    """
    sizes = [corpus.stat().st_size / 1e6 for corpus in corpora]
    rows = []
    for kind, model in models.items():
        clock: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
        cpu: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
        for _ in range(rounds):
            for number, corpus in enumerate(corpora):
                prefixes = {side: str(folder / f"{n}") for n, side in enumerate((MEGATRON, HERE))}
                for side, prefix in prefixes.items():
                    command = commands(corpus, model, prefix, workers)[side]
                    begin, before = time.monotonic(), _cpu_seconds()
                    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
                    if done.returncode:
                        raise DataError(f"{side}: {done.stderr.strip()[-300:]}")
                    clock[side, number].append(time.monotonic() - begin)
                    cpu[side, number].append(_cpu_seconds() - before)
                for suffix in ("bin", "idx"):
                    first, second = (f"{p}_text_document.{suffix}" for p in prefixes.values())
                    if Path(first).read_bytes() != Path(second).read_bytes():
                        raise DataError(f"{first} and {second} differ, expected equal bytes")
        used = {key: statistics.median(values) for key, values in cpu.items()}
        net = {side: used[side, 1] - used[side, 0] for side in (MEGATRON, HERE)}
        for side in (MEGATRON, HERE):
            whole = sizes[1] / statistics.median(clock[side, 1])
            rate = (sizes[1] - sizes[0]) / net[side]
            cells = (whole, sizes[1] / used[side, 1], rate, net[MEGATRON] / net[side])
            rows.append([kind, side, *(f"{cell:.2f}" for cell in cells)])
    return rows


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(rows: list[list[str]], argv: Sequence[str], megabytes: float, rounds: int) -> str:
    """The result in markdown."""
    libraries = ("sentencepiece", "tokenizers", "megatron-core", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    columns = ["tokenizer", "side", "MB/s", "MB per CPU second", "the same without start", "ratio"]
    return "\n".join(
        [
            "# Preprocessing beside Megatron's logic",
            "",
            f"{datetime.date.today()}, CPU machine with {os.cpu_count()} cores "
            f"({platform.machine()}), Python {platform.python_version()}, {versions}. "
            f"{megabytes:.1f} MB of "
            f"JSON lines, medians of {rounds} rounds in turns, equal .bin and .idx. Command: "
            f"`{shlex.join(['python', '-m', 'tools.bench.preprocess', *argv])}`",
            "",
            *markdown_table(columns, rows, text_columns=2),
            "",
            "MB/s is by the clock. The ratio is of the column before it, to Megatron's logic.",
            "",
        ]
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-bytes", type=int, default=16_000_000, help="of text")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="markdown file to write")
    if argv[:1] == [AS_MEGATRON]:
        corpus, model, prefix, workers = argv[1:]
        as_megatron(Path(corpus), Path(model), prefix, int(workers))
        return 0
    args = parser.parse_args(argv)
    return guarded("preprocess.py", lambda: run(args, argv))


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure, print the table and write it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, models = make_inputs(folder, args.max_bytes, args.vocab_size)
        small = folder / "small.jsonl"
        write_corpus(small, args.max_bytes // 20)
        rows = measure([small, corpus], models, folder, args.workers, args.rounds)
        text = report(rows, argv, corpus.stat().st_size / 1e6, args.rounds)
    print(text)
    if args.output is not None:
        write_text(args.output, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
