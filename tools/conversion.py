"""What the conversion tools share: sizes and types of flags, errors, and a clean end."""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megasparse import log
from megasparse.errors import MegasparseError

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """`5GB`, `500MB`, `1GiB` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS or not (size := float(match[1]) * _UNITS[match[2]]):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 5GB")
    return int(size)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of every conversion."""
    parser.add_argument(
        "--output", type=Path, required=True, help="a new or empty folder; appears when complete"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="type of the weights written (default: as stored)"
    )
    parser.add_argument(
        "--max-shard-size", type=byte_count, default=byte_count("5GB"),
        help="largest file, e.g. 5GB or 500MB (default: 5GB)",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-size", type=int, help="tokens before padding, where the input does not say it"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="DIR",
        help="Hugging Face folder whose config.json and tokenizer go with the output (default: "
        "the one that the weights came from; else made from the run)",
    )  # fmt: skip


def vocabulary_multiple(args: argparse.Namespace) -> int:
    """What the vocabulary is padded to a multiple of, as in training."""
    return math.lcm(args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)


def guarded(name: str, work: Callable[[], None]) -> int:
    """Run a tool; its exit code. An error is one line; a signal ends it through its clean-up."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    log.setup(0)
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        work()
    except MegasparseError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0
