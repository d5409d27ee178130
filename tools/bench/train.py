"""Whole training steps on one GPU, dense beside sparse: tokens a second, and where the time goes.

    python -m tools.bench.train --output tools/results/train-h200-2026-01-01.md
    python -m tools.bench.train --variants dense fst -- --config configs/models/gpt2_124m.yaml

The default is a LLaMA of about 1.2B parameters with 8 x 2048 tokens a micro-batch and 4
micro-batches a step; flags after `--` are those of launch/pretrain.py and come last. Data are
generated. Every variant trains in the same process, one after the other; times are medians of the
host's clock around whole steps, each of which reads its loss. Kernel times are of a profile of two
more steps.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import write_text
from megasparse.cli import guarded, markdown_table
from megasparse.config import load_config, padded_vocab_size, resolve
from megasparse.config.shapes import parameter_count
from megasparse.megatron.batches import batches, build_data
from megasparse.megatron.grid import make_grid
from megasparse.sparsity.recipe import recipe_of
from megasparse.train.build import build_engine
from megasparse.train.engine.base import Engine
from megasparse.train.engine.deepspeed import start_process, stop_process
from tools.bench import te_baseline
from tools.bench.profiling import Profile, profiled, table
from tools.bench.short_runs import stand_alone

MODEL = [
    "--num-layers", "16", "--hidden-size", "2048", "--ffn-hidden-size", "8192",
    "--num-attention-heads", "16", "--seq-length", "2048", "--position-embedding-type", "rope",
    "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--vocab-size", "32000",
    "--untie-embeddings-and-output-weights", "--micro-batch-size", "8", "--global-batch-size", "32",
    "--lr", "3e-4", "--bf16",
]  # fmt: skip
ALL = ["--sparse-layers", "*.mlp.*", "*.self_attention.linear_*"]
FST = ["--sparsity-recipe", "fst", "--dense-tail-fraction", "0", "--mask-update-interval"]
VARIANTS = {
    "te bf16": ["--sparsity-recipe", "dense"],  # megatron-core's own layers, Transformer Engine's
    "te fp8": ["--sparsity-recipe", "dense"],
    "dense": ["--sparsity-recipe", "dense"],
    "fst": [*FST, "1"],
    "fst, masks every 40 steps": [*FST, "40"],
    "fst, all linears": [*FST, "1", *ALL],
    "fst fp8, all linears": [*FST, "1", *ALL, "--fp8-format", "e4m3"],
    "fst fp8, all linears, eager": [
        *FST,
        "1",
        *ALL,
        "--fp8-format",
        "e4m3",
        "--cuda-graph-impl",
        "none",
    ],
    "s_ste": ["--sparsity-recipe", "s_ste"],
    "s_ste, all linears": ["--sparsity-recipe", "s_ste", *ALL],
    "s_ste fp8, all linears": ["--sparsity-recipe", "s_ste", *ALL, "--fp8-format", "e4m3"],
}
DEFAULT = [
    "te bf16",
    "te fp8",
    "fst, all linears",
    "fst fp8, all linears",
    "s_ste fp8, all linears",
]


def measure(
    name: str, flags: Sequence[str], warmup: int, steps: int
) -> tuple[dict[str, Any], Profile]:
    """Figures of one variant, and its profile."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # DeepSpeed's engines are not freed
    result, found = _train(name, flags, warmup, steps)
    result["memory"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return result, found


def _train(
    name: str, flags: Sequence[str], warmup: int, steps: int
) -> tuple[dict[str, Any], Profile]:
    config = resolve(load_config(list(flags)), 1)
    device = start_process(config.parallel.distributed_timeout_minutes)
    grid = make_grid(1, device, config.train.seed)
    data = build_data(config, grid)
    vocabulary = padded_vocab_size(data.vocab_size, config)
    if name.startswith("te "):
        engine: Engine = te_baseline.build_baseline(config, grid, vocabulary, name == "te fp8")
    else:
        engine = build_engine(config, grid, recipe_of(config), vocabulary)
    stream = batches(data.streams["train"], config, grid, 0)
    losses, seconds = [], []
    for _ in range(warmup + steps):
        begin = time.monotonic()
        losses.append(engine.train_step(stream).loss)  # reads the loss: the device is done
        seconds.append(time.monotonic() - begin)
    found = profiled(lambda: engine.train_step(stream), 2)
    found.seconds = statistics.median(seconds[warmup:])
    tokens = config.train.global_batch_size * config.model.seq_length
    result = {
        "loss": losses[-1],
        "tokens_per_second": tokens / found.seconds,
        "parameters": parameter_count(config.model, vocabulary),
    }
    return result, found


def report(results: dict[str, tuple[dict[str, Any], Profile]], argv: Sequence[str]) -> str:
    """The tables in markdown."""
    first = next(iter(results.values()))[0]
    lines = [
        f"# Whole training steps on {torch.cuda.get_device_name()}",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, {first['parameters'] / 1e9:.2f}B "
        f"parameters. Command: `{shlex.join(['python', '-m', 'tools.bench.train', *argv])}`",
        "",
        *markdown_table(
            ["variant", "tokens/s", "to the first", "ms a step", "GiB", "loss"],
            [
                [
                    name,
                    f"{result['tokens_per_second']:,.0f}",
                    f"{result['tokens_per_second'] / first['tokens_per_second']:.3f}",
                    f"{1e3 * found.seconds:.1f}",
                    f"{result['memory']:.1f}",
                    f"{result['loss']:.4f}",
                ]
                for name, (result, found) in results.items()
            ],
        ),
    ]
    lines += ["", *table({name: found for name, (_, found) in results.items()})]
    for name, (_, found) in results.items():
        lines += ["", f"Longest kernels of {name} (ms, launches):", ""]
        lines += [
            f"    {1e3 * s:8.2f} {n:5d}  {kernel[:90]}" for s, n, kernel in found.longest[:12]
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    mark = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT)
    parser.add_argument("--warmup", type=int, default=3, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    args = parser.parse_args(argv[:mark])
    if not torch.cuda.is_available():
        print("train.py: error: no GPU is here", file=sys.stderr)
        return 1
    return guarded("train.py", lambda: run(args, argv, argv[mark + 1 :]))


def run(args: argparse.Namespace, argv: Sequence[str], flags: Sequence[str]) -> None:
    """Measure all variants, print the tables and write them after each variant."""
    stand_alone()
    results = {}
    for name in args.variants:
        own = ["--mock-data", "--eval-iters", "0", "--train-iters", "1000", *VARIANTS[name]]
        results[name] = measure(name, [*MODEL, *own, *flags], args.warmup, args.steps)
        rate = results[name][0]["tokens_per_second"]
        print(f"{name}: {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
        text = report(results, argv)
        if args.output:  # what was measured is kept, should a later variant fail
            write_text(args.output, text)
    print(text)
    stop_process()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
