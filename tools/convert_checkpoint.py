"""Convert checkpoints between Hugging Face, megasparse and Megatron.

    python tools/convert_checkpoint.py --from huggingface --to megasparse \\
        --input Llama-3.2-1B --output start
    python launch/pretrain.py --config start/config.yaml --load start --run-dir runs/first ...

    python tools/convert_checkpoint.py --from megasparse --to huggingface \\
        --input runs/first --output exported

    python tools/convert_checkpoint.py --from megatron --to megasparse \\
        --input megatron/checkpoints --output start

Families of Hugging Face in safetensors (docs/export.md); Megatron-LM, Megatron-core (torch and
torch_dist) and Megatron-DeepSpeed, written as torch_dist. Nothing in a file is executed. One tensor
at a time is in memory. A checkpoint of megasparse has no layout: it is read with any tensor- and
pipeline-parallel size. What a sparse run has trained is written by tools/export_sparse.py; here
only its dense master weights are (--master-weights).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megasparse.atomic_files import require_empty
from megasparse.checkpoint.importer import write_imported
from megasparse.checkpoint.model import StoredModel, open_checkpoint
from megasparse.cli import guarded
from megasparse.convert.export import ExportOptions, write_huggingface
from megasparse.convert.flags import DTYPES, add_common, vocabulary_multiple
from megasparse.convert.huggingface.folder import CONFIG, HuggingFaceModel
from megasparse.convert.megatron.model import MegatronModel
from megasparse.convert.megatron.torch_dist import TorchDistModel, is_torch_dist
from megasparse.convert.megatron.torch_dist_write import write_torch_dist
from megasparse.convert.source import Source
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import ConfigError, StorageError
from megasparse.inference.tokenizer_files import carried_files, run_options

HUGGINGFACE, MEGASPARSE, MEGATRON = "huggingface", "megasparse", "megatron"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="source", choices=(HUGGINGFACE, MEGASPARSE, MEGATRON), required=True
    )
    parser.add_argument(
        "--to",
        choices=(HUGGINGFACE, MEGASPARSE, MEGATRON),
        required=True,
        help="megatron: a torch_dist checkpoint of Megatron-core",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help="folder of the model; for megasparse a run, its checkpoints or one of them; for "
        "megatron the checkpoints or one iteration",
    )
    add_common(parser)
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        help="pad the vocabulary to a multiple, as in training (default: 128)",
    )
    parser.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        help="and of this (default: 1); any size can load what 128 pads for up to 128 ranks",
    )
    parser.add_argument(
        "--master-weights",
        action="store_true",
        help="of a sparse checkpoint, the dense weights behind the masks",
    )
    parser.add_argument(
        "--optimizer-state",
        action="store_true",
        help="from megatron to megasparse: Adam's moments, float32 masters and steps too "
        "(torch_dist)",
    )
    args = parser.parse_args(argv)
    if args.source == args.to:
        parser.error(f"--from and --to are both {args.to}")
    if args.optimizer_state and (args.source, args.to) != (MEGATRON, MEGASPARSE):
        parser.error("--optimizer-state: only --from megatron --to megasparse")
    if args.optimizer_state and args.dtype not in (None, "float32"):
        parser.error(f"--optimizer-state takes float32 masters, --dtype is {args.dtype}")
    if args.make_vocab_size_divisible_by < 1 or args.tensor_model_parallel_size < 1:
        parser.error("--make-vocab-size-divisible-by and --tensor-model-parallel-size: at least 1")
    return args


def open_source(args: argparse.Namespace) -> Source:
    """The input, checked as far as its headers go."""
    dtype = DTYPES.get(args.dtype)
    if args.source == HUGGINGFACE:
        return HuggingFaceModel(args.input, dtype)
    if args.source == MEGATRON:
        if is_torch_dist(args.input):
            return TorchDistModel(args.input, dtype, args.vocab_size, args.optimizer_state)
        if args.optimizer_state:
            raise ConfigError(
                f"{args.input}: --optimizer-state is read of torch_dist checkpoints alone"
            )
        return MegatronModel(args.input, dtype, args.vocab_size)
    reader = open_checkpoint(args.input, ControlPlane(None))
    stored = StoredModel(reader, False, dtype, args.vocab_size)
    if stored.sparse and not args.master_weights:
        raise ConfigError(
            f"{reader.folder}: a sparse checkpoint; tools/export_sparse.py writes what was "
            "trained, --master-weights the dense weights behind the masks"
        )
    return stored


def convert(args: argparse.Namespace) -> None:
    """Convert as the flags say, and print what was written."""
    require_empty(args.output, StorageError)
    source = open_source(args)
    if args.to == MEGASPARSE:
        carried = []
        folder = args.input if args.source == HUGGINGFACE else args.reference
        if folder is not None:
            carried = [folder / CONFIG, *carried_files(folder)]
        size, multiple = args.max_shard_size, vocabulary_multiple(args)
        optimizer = source.optimizer if isinstance(source, TorchDistModel) else None
        written = write_imported(
            source, args.output, size, multiple, carried, bar=True, optimizer=optimizer
        )
        if optimizer is not None:
            print(f"with Adam's moments after {optimizer.steps} steps")
        start = f"--config {args.output}/config.yaml --load {args.output}"
        print(f"{written}: {describe(source)}; start with {start}")
        return
    if args.to == MEGATRON:
        write_torch_dist(source, args.output, vocabulary_multiple(args))
        print(f"{args.output}: {describe(source)}; Megatron loads it by --load and --finetune")
        return
    if isinstance(source, StoredModel):
        options = run_options(source, args)
    else:
        options = ExportOptions(args.max_shard_size, bar=True)
        if args.reference is not None:
            options.config = args.reference / CONFIG
            options.carried = {file.name: file for file in carried_files(args.reference)}
    write_huggingface(source, args.output, options)
    print(f"{args.output}: {describe(source)}")


def describe(source: Source) -> str:
    """Parameters, values and types, in words."""
    entries = source.entries()
    numel = sum(entry.nbytes // entry.dtype.itemsize for entry in entries)
    kinds = sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})
    return f"{len(entries)} parameters, {numel:,} values, {', '.join(kinds)}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("convert_checkpoint.py", lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
