"""Export a sparse run to a Hugging Face folder, proven 2:4, tensor by tensor.

    python tools/export_sparse.py --input runs/first --output exported

writes what the run has trained: masks applied, S-STE's scale multiplied in, the zeros in place and
nothing about sparsity in config.json, which every engine loads. `sparsity.json` lists for each
tensor whether it is 2:4, transposable, its density and its digest. A tensor that should be 2:4 and
is not ends the export.

    python tools/export_sparse.py --input runs/first --output packed --format hopper

packs the 2:4 matrices into about half the space (with --dtype bfloat16 if they are float32):
`hopper` for megasparse's own kernels, `torch` for torch's semi-structured tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import require_empty
from megasparse.checkpoint.model import ADAPTER, PROJECTION, StoredModel, open_checkpoint
from megasparse.cli import guarded
from megasparse.convert.export import SIDE_FILE, write_huggingface
from megasparse.convert.flags import DTYPES, add_common
from megasparse.convert.packed import FORMATS
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import ConfigError, StorageError
from megasparse.inference.tokenizer_files import run_options
from megasparse.log import logger

DENSE = "dense"
LOW_RANK_FILE = "slorb.safetensors"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", type=Path, required=True, help="a run, its checkpoints, or one of them"
    )
    add_common(parser)
    parser.add_argument(
        "--format",
        choices=(DENSE, *FORMATS),
        default=DENSE,
        help="how 2:4 matrices are stored (default: dense, with the zeros in place)",
    )
    parser.add_argument(
        "--slorb",
        choices=("fold", "separate"),
        default="fold",
        help="fold SLoRB's matrices into their weights, which are no longer 2:4 then (default), or "
        f"leave those 2:4 and write the matrices to {LOW_RANK_FILE}",
    )
    return parser.parse_args(argv)


def export(args: argparse.Namespace) -> None:
    """Export as the flags say, and print what was written."""
    require_empty(args.output, StorageError)
    reader = open_checkpoint(args.input, ControlPlane(None))
    fold = args.slorb == "fold"
    stored = StoredModel(reader, True, DTYPES.get(args.dtype), args.vocab_size, fold)
    if not stored.sparse and not (fold and stored.boosted):
        phase = "is in its dense phase" if stored.recipe.is_sparse else "is dense"
        raise ConfigError(
            f"{reader.folder}: the run ({stored.recipe.name}, step {stored.step}) {phase}: nothing "
            "is 2:4; tools/convert_checkpoint.py exports it"
        )
    if stored.recipe.simulate_fp8:
        logger.warning("the run simulated FP8 (--simulate-fp8); the export has its weights in full")
    options = run_options(stored, args)
    options.sparse, options.transposable = stored.sparse, stored.phase.transposable
    options.packing = None if args.format == DENSE else args.format
    if stored.boosted and not fold:
        options.extra_tensors[LOW_RANK_FILE] = low_rank_tensors(stored)
    tensors = write_huggingface(stored, args.output, options)
    print(summary(args.output, tensors, stored))


def low_rank_tensors(stored: StoredModel) -> dict[str, torch.Tensor]:
    """S and P of every boosted layer, by megasparse's names; a layer adds `(x P^T) S^T`."""
    tensors = {}
    for name in sorted(stored.boosted):
        base = name.removesuffix(".weight")
        adapter, projection = stored.low_rank(name)
        tensors[base + ADAPTER] = adapter
        if projection is not None:
            tensors[base + PROJECTION] = projection
    return tensors


def summary(output: Path, tensors: dict[str, Any], stored: StoredModel) -> str:
    """What was written and what of it is 2:4, in words."""
    sparse = [record for record in tensors.values() if record["parameter"] in stored.sparse]
    transposable = sum(record["transposable"] for record in sparse)
    if stored.boosted and not sparse:
        logger.warning(
            "SLoRB's matrices are folded in, so no weight is 2:4 any more; --slorb separate keeps "
            "the weights 2:4 and writes the matrices beside them"
        )
    return (
        f"{output}: step {stored.step} of {stored.recipe.name}; {len(sparse)} of {len(tensors)} "
        f"tensors are 2:4, {transposable} transposable; see {SIDE_FILE}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("export_sparse.py", lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
