"""Train a SentencePiece tokenizer; the result decodes source code exactly.

Inputs are those of tools/preprocess_data.py: JSON lines (plain, gzip, zstd), folders, Parquet.

python tools/train_tokenizer.py --input corpus.jsonl --output tokenizer.model --vocab-size 4096
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megasparse.atomic_files import replacing
from megasparse.cli import guarded
from megasparse.data.jsonl import read_texts
from megasparse.data.tokenizers.tokenizer import load_tokenizer, train_sentencepiece
from megasparse.errors import DataError
from megasparse.progress import progress

# The trainer takes short "sentences": whole lines up to about this many characters.
CHUNK_CHARACTERS = 2000
CHECKED_DOCUMENTS = 100


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files and folders")
    parser.add_argument("--json-key", default="text", help="key of the text (default: text)")
    parser.add_argument("--output", type=Path, required=True, help=".model file to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="default: %(default)s")
    parser.add_argument(
        "--model-type", choices=("bpe", "unigram"), default="bpe", help="default: %(default)s"
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=16_000_000,
        help="read about this much text, from the start of the inputs (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def chunks(text: str) -> Iterator[str]:
    """Split a document into pieces of whole lines; a very long line is cut."""
    buffer, size = [], 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), CHUNK_CHARACTERS):
            part = line[start : start + CHUNK_CHARACTERS]
            buffer.append(part)
            size += len(part)
            if size >= CHUNK_CHARACTERS:
                yield "".join(buffer)
                buffer, size = [], 0
    if buffer:
        yield "".join(buffer)


def read_sample(inputs: Sequence[Path], key: str, max_bytes: int) -> list[str]:
    """Documents from the start of `inputs`, until they hold `max_bytes` of text."""
    texts, size = [], 0
    total = min(max_bytes, sum(path.stat().st_size for path in inputs if path.is_file()))
    with progress(desc="reading", total=total, unit="B") as bar:
        for path in inputs:
            for text in read_texts(path, key):
                texts.append(text)
                num_bytes = len(text.encode("utf-8"))
                size += num_bytes
                bar.update(num_bytes)
                if size >= max_bytes:
                    return texts
    if size == 0:
        raise DataError(f"{inputs[0]}: found no text under the key {key!r}")
    return texts


def train(args: argparse.Namespace) -> str:
    """Train, check and write the model; returns the summary line."""
    if args.output.suffix != ".model":
        raise DataError(f"{args.output}: expected a name that ends with .model")
    if args.output.exists() and not args.overwrite:
        raise DataError(f"{args.output}: exists already; --overwrite replaces it")
    texts = read_sample(args.input, args.json_key, args.max_bytes)
    model = train_sentencepiece(
        (chunk for text in texts for chunk in chunks(text)), args.vocab_size, args.model_type
    )
    with replacing(args.output, DataError) as stream:
        stream.write(model)
    tokenizer = load_tokenizer(args.output)
    sample = texts[:: max(1, len(texts) // CHECKED_DOCUMENTS)]
    encoded = [tokenizer.encode(text) for text in sample]
    exact = sum(tokenizer.decode(ids) == text for ids, text in zip(encoded, sample))
    ratio = sum(map(len, sample)) / max(1, sum(map(len, encoded)))
    return (
        f"{args.output}: {args.model_type}, {tokenizer.vocab_size} tokens, end of document "
        f"{tokenizer.eod}, {ratio:.2f} characters a token, {exact} of {len(sample)} sampled "
        f"documents decode exactly, sha256 {tokenizer.digest}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("train_tokenizer.py", lambda: print(train(args)))


if __name__ == "__main__":
    sys.exit(main())
