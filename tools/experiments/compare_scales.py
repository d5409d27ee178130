"""FP8 scales that are powers of two against scales that are not: losses of the same runs.

    python -m tools.experiments.compare_scales --output runs/scales

A LLaMA of 6 layers, 512 wide, trains by FST with all linears in e4m3 under delayed scaling, on the
sources of this Python, 16,384 tokens a step. Each seed trains twice: with scales rounded to powers
of two, which rest until they no longer fit (the default), and with `448 / amax` as it is, anew in
every step, as Transformer Engine has them. The second kind runs without CUDA graphs, which need the
first. The table has the mean loss of every hundred steps.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megasparse.atomic_files import write_text
from megasparse.cli import guarded, markdown_table
from megasparse.config import load_config, padded_vocab_size, resolve
from megasparse.fp8 import delayed
from megasparse.megatron.data.batches import batches, build_data
from megasparse.megatron.grid import make_grid
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.train.build import build_engine
from megasparse.train.engine.deepspeed import start_process, stop_process
from tools.bench.parts.short_runs import stand_alone
from tools.experiments.corpus_data import Text, make_data

MODEL = [
    "--num-layers", "6", "--hidden-size", "512", "--ffn-hidden-size", "1536",
    "--num-attention-heads", "8", "--seq-length", "512", "--micro-batch-size", "32",
    "--global-batch-size", "32", "--position-embedding-type", "rope", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--bf16", "--fp8-format", "e4m3", "--sparsity-recipe",
    "fst", "--masked-decay", "2e-3", "--dense-tail-fraction", "0", "--sparse-layers", "*.mlp.*",
    "*.self_attention.linear_*", "--lr", "2e-3", "--lr-warmup-iters", "50", "--min-lr", "2e-4",
    "--eval-iters", "0", "--split", "98,2,0",
]  # fmt: skip
TEXT = Text(vocab_size=4096, corpus_bytes=20_000_000, installed_packages=False, workers=2)
KINDS = ("powers of two", "as they are")
SPAN = 100


def losses(output: Path, seed: int, steps: int, kind: str) -> list[float]:
    """Of every step of one run."""
    flags = [*MODEL, "--data-path", str(output / "data_text_document"), "--seed", str(seed)]
    flags += ["--tokenizer-model", str(output / "tokenizer.model"), "--train-iters", str(steps)]
    before = delayed.power_of_two_, delayed.keep_or_round_
    if kind == "as they are":
        flags += ["--cuda-graph-impl", "none"]
        delayed.power_of_two_ = lambda scale: scale
        delayed.keep_or_round_ = lambda scale, before: None
    try:
        config = resolve(load_config(flags), int(os.environ["WORLD_SIZE"]))
        device = start_process(config.parallel.distributed_timeout_minutes)
        grid = make_grid(1, device, config.train.seed)
        data = build_data(config, grid)
        vocabulary = padded_vocab_size(data.vocab_size, config)
        engine = build_engine(config, grid, recipe_of(config), vocabulary)
        stream = batches(data.streams["train"], config, grid, 0)
        found = [engine.train_step(stream).loss for _ in range(steps)]
        engine.layout.close()
    finally:
        delayed.power_of_two_, delayed.keep_or_round_ = before
    assert None not in found
    return [loss for loss in found if loss is not None]


def report(results: dict[tuple[int, str], list[float]], argv: Sequence[str]) -> str:
    """The table in markdown."""
    steps = len(next(iter(results.values())))
    spans = [(start, start + SPAN) for start in range(0, steps - SPAN + 1, SPAN)]
    rows = [
        [str(seed), kind, *(f"{statistics.mean(found[a:b]):.4f}" for a, b in spans)]
        for (seed, kind), found in results.items()
    ]
    for seed in sorted({seed for seed, _ in results}):
        pair = [results[seed, kind] for kind in KINDS if (seed, kind) in results]
        if len(pair) == 2:
            gaps = [statistics.mean(pair[0][a:b]) - statistics.mean(pair[1][a:b]) for a, b in spans]
            rows.append([str(seed), "difference", *(f"{gap:+.4f}" for gap in gaps)])
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    head = ["seed", "scales", *(f"steps {a + 1} to {b}" for a, b in spans)]
    return "\n".join(
        [
            f"# FP8 scales as powers of two on {where}",
            "",
            f"{datetime.date.today()}, torch {torch.__version__}. Command: "
            f"`{shlex.join(['python', '-m', 'tools.experiments.compare_scales', *argv])}`",
            "",
            *markdown_table(head, rows),
            "",
        ]
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of data and table")
    parser.add_argument("--steps", type=int, default=500, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args(argv)
    return guarded("compare_scales.py", lambda: run(args, argv))


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """All runs, and the table after each."""
    stand_alone()
    make_data(args.output, TEXT, [])
    results = {}
    for seed in args.seeds:
        for kind in KINDS:
            results[seed, kind] = losses(args.output, seed, args.steps, kind)
            write_text(args.output / "scales.md", report(results, argv))
            print(f"seed {seed}, {kind}: {results[seed, kind][-1]:.4f}", file=sys.stderr)
    print(report(results, argv))
    stop_process()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
