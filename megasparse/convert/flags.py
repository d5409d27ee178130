"""Flags that the conversion commands share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from megasparse.cli import byte_count
from megasparse.data.tokenizers.token_flags import add_token_flags

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of every conversion."""
    parser.add_argument(
        "--output", type=Path, required=True, help="a new or empty folder; appears when complete"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="type of the weights written (default: as stored)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_count,
        default=byte_count("5GB"),
        help="largest file, e.g. 5GB or 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--vocab-size", type=int, help="tokens before padding, where the input does not say it"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="Hugging Face folder whose config.json and tokenizer go with the output (default: "
        "the one that the weights came from; else made from the run)",
    )
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="FILE",
        help="where the run's tokenizer is now (default: where it was)",
    )
    parser.add_argument(
        "--tokenizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the run's tokenizer too (default: on)",
    )
    add_token_flags(parser)


def vocabulary_multiple(args: argparse.Namespace) -> int:
    """What the vocabulary is padded to a multiple of, as in training."""
    return math.lcm(args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
