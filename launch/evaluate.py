"""Perplexity of a model on a dataset or a text, and what is 2:4 in its checkpoint.

    python launch/evaluate.py --load runs/first --data-path data/valid_text_document
    python launch/evaluate.py --load runs/first --text wiki.test.raw --stride 512
    deepspeed --num_gpus 8 launch/evaluate.py --load runs/first --tensor-model-parallel-size 2 ...

Every token but the first is scored once, with at least (window - stride) tokens before it; ranks
beyond the tensor-parallel size share the windows.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from megasparse.megatron.import_without_compile import import_megatron

import_megatron()  # before the imports that need it

import numpy as np

from megasparse.atomic_files import write_json
from megasparse.checkpoint.model import StoredModel
from megasparse.checkpoint.proof import check_sparsity, format_tensors
from megasparse.cli import guarded
from megasparse.data.indexed import validate
from megasparse.data.sidecar import bin_path, check_sidecar
from megasparse.data.tokenizers.tokenizer import begin, token_rules
from megasparse.distributed.environment import rank_for_log
from megasparse.errors import ConfigError, DataError
from megasparse.inference.loading import LoadedModel, add_model_flags, leave, open_model
from megasparse.inference.perplexity import perplexity


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    data = parser.add_argument_group("data")
    which = data.add_mutually_exclusive_group()
    which.add_argument("--data-path", metavar="PREFIX", help="a dataset (.bin and .idx), whole")
    which.add_argument("--text", metavar="FILE", type=Path, help="a text file, as one document")
    data.add_argument(
        "--seq-length", type=int, metavar="INT", help="window; default: as in training"
    )
    data.add_argument("--stride", type=int, metavar="INT", help="default: the window")
    data.add_argument("--micro-batch-size", type=int, default=1, metavar="INT")
    data.add_argument("--max-tokens", type=int, metavar="INT", help="only the first of the data")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the figures as JSON")
    return parser.parse_args(argv)


def read_tokens(args: argparse.Namespace, loaded: LoadedModel) -> np.ndarray:
    """The tokens of the data, in order."""
    if args.data_path is not None:
        index = validate(args.data_path, loaded.vocab_size)
        tokenizer = loaded.tokenizer
        check_sidecar(
            args.data_path,
            tokenizer.digest if tokenizer else None,
            rules=token_rules(tokenizer) if tokenizer else None,
        )
        tokens: np.ndarray = np.memmap(bin_path(args.data_path), dtype=index.dtype, mode="r")
    else:
        try:
            text = args.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{args.text}: cannot read: {error}") from None
        tokenizer = loaded.require_tokenizer()
        tokens = np.array(begin(tokenizer) + tokenizer.encode(text), dtype=np.int64)
        if len(tokens) and int(tokens.max()) >= loaded.vocab_size:
            raise DataError(f"{args.text}: the tokenizer gives ids beyond {loaded.vocab_size}")
    return tokens[: args.max_tokens] if args.max_tokens else tokens


def evaluate(args: argparse.Namespace) -> None:
    """Compute what the flags ask for and print it on the first rank."""
    loaded = open_model(args)
    figures: dict[str, Any] = {"model": loaded.source.where}
    lines = []
    if args.data_path is not None or args.text is not None:
        length = args.seq_length or loaded.source.model.seq_length
        if length > loaded.context_length:
            raise ConfigError(
                f"seq_length {length} is longer than the model's context {loaded.context_length}"
            )
        stride = args.stride or length
        first = loaded.grid.rank == 0
        tokens = read_tokens(args, loaded)
        result = perplexity(
            loaded.model, loaded.grid, tokens, length, stride, args.micro_batch_size, bar=first
        )
        figures |= {"loss": result.loss, "perplexity": result.value, "tokens": result.tokens}
        figures |= {"seq_length": length, "stride": stride}
        figures["data"] = str(args.data_path or args.text)
        lines.append(
            f"perplexity {result.value:.4f} | loss {result.loss:.6f} | {result.tokens} tokens | "
            f"window {length}, stride {stride}"
        )
    if loaded.grid.rank:
        return
    if isinstance(loaded.source, StoredModel):
        source = loaded.source
        tensors = check_sparsity(source.reader, source.recipe, source.train_iters)
        figures["sparsity"] = [vars(tensor) for tensor in tensors]
        lines += format_tensors(tensors) if tensors else [f"{source.where}: no sparse layer"]
    print("\n".join(lines), flush=True)
    if args.output is not None:
        write_json(args.output, figures, indent=1)


if __name__ == "__main__":
    arguments = parse_args()
    code = guarded("evaluate.py", lambda: evaluate(arguments), rank_for_log())
    leave(code)
    sys.exit(code)
