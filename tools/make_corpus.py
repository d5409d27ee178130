"""Write a small JSONL corpus from the Python standard library's sources (no download).

python tools/make_corpus.py --output corpus.jsonl
python tools/make_corpus.py --sft --output chats.jsonl

With --sft it holds conversations: what a function does, and the first sentence of its docstring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megasparse.cli import guarded
from megasparse.data.chat.corpus import write_conversations
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
    parser.add_argument("--sft", action="store_true", help="conversations instead of texts")
    parser.add_argument(
        "--max-conversations", type=int, help="with --sft: at most so many (default: all)"
    )
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> None:
    """Write the corpus and say how much it is."""
    if args.sft:
        count = write_conversations(args.output, args.max_conversations)
        print(f"{args.output}: {count} conversations")
        return
    summary = write_corpus(args.output, args.max_bytes)
    print(f"{args.output}: {summary.num_documents} documents, {summary.num_bytes} bytes of text")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("make_corpus.py", lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())
