"""Write a small JSONL corpus from the Python standard library's sources (no download).

python tools/make_corpus.py --output corpus.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megasparse.cli import guarded
from megasparse.data.corpus import DEFAULT_MAX_BYTES, write_corpus


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=DEFAULT_MAX_BYTES,
        help="upper bound of the text in bytes (default: %(default)s)",
    )
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> None:
    """Write the corpus and say how much it is."""
    summary = write_corpus(args.output, args.max_bytes)
    print(f"{args.output}: {summary.num_documents} documents, {summary.num_bytes} bytes of text")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("make_corpus.py", lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())
