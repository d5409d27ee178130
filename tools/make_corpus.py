"""Write a small JSONL corpus from the Python standard library's sources (no download).

python tools/make_corpus.py --output corpus.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megasparse.data.corpus import DEFAULT_MAX_BYTES, write_corpus
from megasparse.errors import MegasparseError


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


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        summary = write_corpus(args.output, args.max_bytes)
    except MegasparseError as error:
        print(f"make_corpus.py: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.output}: {summary.num_documents} documents, {summary.num_bytes} bytes of text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
