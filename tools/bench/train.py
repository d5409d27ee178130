"""Whole training steps, dense beside sparse: tokens a second, and where the time goes.

    python -m tools.bench.train --output tools/results/train-h200-2026-01-01.md
    python -m tools.bench.train --shape 8b-layers --variants "te fp8" "fst fp8" "fst fp8, eager"
    python -m torch.distributed.run --nproc-per-node 2 -m tools.bench.train --shape 1.2b \
        -- --tensor-model-parallel-size 2 --sequence-parallel
    python -m torch.distributed.run --nproc-per-node 2 -m tools.bench.train --shape 32k \
        -- --context-parallel-size 2

Shapes have 4 micro-batches a step: a LLaMA of about 1.2B parameters with 8 x 2048 tokens, 8 layers
of Llama-3-8B with 1 x 4096, 16 layers of Qwen3-8B with 1 x 4096 and of Mistral-7B with 1 x 8192 (as
many as fit on one GPU), and GPT-2 124M with 16 x 1024. Two have 2 micro-batches: a mixture of 8
experts, 2 of which compute a token (3.2B parameters, 1.1B of a token), with 4 x 4096 tokens, and 6
layers of Llama-3-8B with one sequence of 32768. Flags after `--` are those of
launch/pretrain.py and come last. Data are generated. All linears of the layers are 2:4. Every
variant trains in the same process, one after the other, with CUDA graphs unless its name ends in
", eager"; "te" are megatron-core's own layers of Transformer Engine, captured by the same wrapper,
"fused" with GEMMs that add to the weights' gradients. Sparse variants search their masks in every
step, "40" every 40 steps, as the paper does; of these a step without a search is timed. "library":
BF16 with operands that cuSPARSELt packs itself, as on GPUs whose layout our kernels do not write.
Times are medians of the host's clock around whole steps, each of which reads its loss. Kernel times
are of a profile of two more steps. With --log-steps also steps whose metrics are taken are timed,
as every `--log-interval`-th step of a run is; what the run writes is not among it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import write_text
from megasparse.cli import guarded, markdown_table
from megasparse.config import load_config, padded_vocab_size, resolve
from megasparse.config.shapes import parameter_count
from megasparse.megatron.data.batches import batches, build_data
from megasparse.megatron.grid import make_grid
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.train import layer_metrics
from megasparse.train.build import build_engine
from megasparse.train.engine.base import Engine
from megasparse.train.engine.deepspeed import start_process, stop_process
from tools.bench.parts import te_baseline
from tools.bench.parts.profiling import Profile, profiled, table
from tools.bench.parts.short_runs import stand_alone

LLAMA = [
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu",
    "--disable-bias-linear", "--vocab-size", "32000", "--untie-embeddings-and-output-weights",
]  # fmt: skip
SHAPES = {
    "1.2b": [
        *LLAMA, "--num-layers", "16", "--hidden-size", "2048", "--ffn-hidden-size", "8192",
        "--num-attention-heads", "16", "--seq-length", "2048", "--micro-batch-size", "8",
        "--global-batch-size", "32",
    ],
    "8b-layers": [
        *LLAMA, "--num-layers", "8", "--hidden-size", "4096", "--ffn-hidden-size", "14336",
        "--num-attention-heads", "32", "--group-query-attention", "--num-query-groups", "8",
        "--seq-length", "4096", "--micro-batch-size", "1", "--global-batch-size", "4",
    ],
    "qwen3-8b": [
        *LLAMA, "--num-layers", "16", "--hidden-size", "4096", "--ffn-hidden-size", "12288",
        "--num-attention-heads", "32", "--group-query-attention", "--num-query-groups", "8",
        "--kv-channels", "128", "--qk-layernorm", "--rotary-base", "1000000", "--vocab-size",
        "151936", "--seq-length", "4096", "--micro-batch-size", "1", "--global-batch-size", "4",
    ],
    "mistral-7b": [
        *LLAMA, "--num-layers", "16", "--hidden-size", "4096", "--ffn-hidden-size", "14336",
        "--num-attention-heads", "32", "--group-query-attention", "--num-query-groups", "8",
        "--window-size", "4095,0", "--seq-length", "8192", "--micro-batch-size", "1",
        "--global-batch-size", "4",
    ],
    "moe": [
        *LLAMA, "--num-layers", "14", "--hidden-size", "2048", "--ffn-hidden-size", "4096",
        "--num-attention-heads", "16", "--num-experts", "8", "--moe-router-topk", "2",
        "--moe-aux-loss-coeff", "0.01", "--moe-grouped-gemm", "--seq-length", "4096",
        "--micro-batch-size", "4", "--global-batch-size", "8",
    ],
    "32k": [
        *LLAMA, "--num-layers", "6", "--hidden-size", "4096", "--ffn-hidden-size", "14336",
        "--num-attention-heads", "32", "--group-query-attention", "--num-query-groups", "8",
        "--seq-length", "32768", "--micro-batch-size", "1", "--global-batch-size", "2",
    ],
    "gpt2-124m": [
        "--num-layers", "12", "--hidden-size", "768", "--num-attention-heads", "12",
        "--seq-length", "1024", "--vocab-size", "50257", "--micro-batch-size", "16",
        "--global-batch-size", "64",
    ],
}  # fmt: skip
COMMON = ["--lr", "3e-4", "--bf16", "--mock-data", "--eval-iters", "0", "--train-iters", "1000"]
ALL = ["--sparse-layers", "*.mlp.*", "*.self_attention.linear_*"]
FST = ["--sparsity-recipe", "fst", "--dense-tail-fraction", "0", *ALL]
S_STE = ["--sparsity-recipe", "s_ste", *ALL]
S_STE_3 = ["--sparsity-recipe", "s_ste_3", *ALL]
FP8 = ["--fp8-format", "e4m3"]
# Documents of generated data have mixed lengths; they do not see each other.
APART = ["--reset-position-ids", "--reset-attention-mask"]
EAGER = ", eager"
VARIANTS = {
    "te bf16": ["--sparsity-recipe", "dense"],
    "te fp8": ["--sparsity-recipe", "dense"],
    "te bf16 fused": ["--sparsity-recipe", "dense"],
    "te fp8 fused": ["--sparsity-recipe", "dense"],
    "dense": ["--sparsity-recipe", "dense"],
    "dense fp8": ["--sparsity-recipe", "dense", *FP8],
    "dense packed": ["--sparsity-recipe", "dense", *APART],
    "dense masked": ["--sparsity-recipe", "dense", *APART, "--transformer-impl", "local"],
    "fst": FST,
    "fst library": [*FST, "--operand-packing", "cusparselt"],
    "fst fp8": [*FST, *FP8],
    "fst fp8 40": [*FST, *FP8, "--mask-update-interval", "40"],
    "fst fp8 current": [*FST, *FP8, "--fp8-recipe", "tensorwise"],
    "fst fp8 packed": [*FST, *FP8, *APART],
    "s_ste": S_STE,
    "s_ste fp8": [*S_STE, *FP8],
    "s_ste_3": S_STE_3,
    "s_ste_3 fp8": [*S_STE_3, *FP8],
}
# The first step with metrics is eager, the second captures graphs.
LOG_WARMUP = 3
# Of what is freed between variants; libraries keep smaller things for good.
LARGE_BYTES = 2**26
DENSE = ("te bf16", "te fp8", "te bf16 fused", "te fp8 fused", "dense", "dense fp8")
DEFAULT = ["dense", "te bf16", "te fp8", "fst fp8", "s_ste fp8"]


def measure(
    name: str, flags: Sequence[str], warmup: int, steps: int, log_steps: int = 0
) -> tuple[dict[str, Any], Profile]:
    """Figures of one variant, and its profile; with so many log steps timed too."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    engine, result, found = _train(name, flags, warmup, steps, log_steps)
    # Reserved: what graphs hold beside what is allocated now counts too.
    result["memory"] = (torch.cuda.max_memory_reserved() - before) / 2**30
    _free(engine)
    return result, found


def _free(engine: Engine) -> None:
    """Give back the memory of an engine, to which DeepSpeed keeps referring."""
    engine.layout.close()
    gc.collect()
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.is_cuda:
            storage = thing.untyped_storage()
            if storage.nbytes() > LARGE_BYTES:
                storage.resize_(0)
    torch.cuda.empty_cache()


def log_step_seconds(engine: Engine, step: Callable[[], Any], count: int) -> float:
    """The median of `count` steps with the metrics of the layers, which are read after each."""
    seconds = []
    for _ in range(LOG_WARMUP + count):
        begin = time.monotonic()
        sparse = engine.controller.sparse_now
        engine.controller.ask(True)
        step()
        engine.controller.ask(False)
        layer_metrics.measure_all(engine, sparse, [0.0], 0.0)
        seconds.append(time.monotonic() - begin)
    return statistics.median(seconds[LOG_WARMUP:])


def _train(
    name: str, flags: Sequence[str], warmup: int, steps: int, log_steps: int
) -> tuple[Engine, dict[str, Any], Profile]:
    config = resolve(load_config(list(flags)), int(os.environ["WORLD_SIZE"]))
    device = start_process(config.parallel.distributed_timeout_minutes)
    parallel = config.parallel
    grid = make_grid(
        parallel.tensor_model_parallel_size,
        device,
        config.train.seed,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
    )
    data = build_data(config, grid)
    vocabulary = padded_vocab_size(data.vocab_size, config)
    if name.startswith("te "):
        fp8 = name.startswith("te fp8")
        fused = name.removesuffix(EAGER).endswith(" fused")
        engine: Engine = te_baseline.build_baseline(config, grid, vocabulary, fp8, fused)
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
    if log_steps:
        result["log_step"] = log_step_seconds(engine, lambda: engine.train_step(stream), log_steps)
    return engine, result, found


def report(
    results: dict[str, tuple[dict[str, Any], Profile]], argv: Sequence[str], kernels: int
) -> str:
    """The tables in markdown, with so many kernels of each variant by name."""
    first = next(iter(results.values()))[0]
    rates = {name: result["tokens_per_second"] for name, (result, _) in results.items()}
    best = max((rates[name] for name in DENSE if name in rates), default=None)
    ranks = int(os.environ["WORLD_SIZE"])
    logged = ["ms a log step"] if "log_step" in first else []
    lines = [
        f"# Whole training steps on {ranks} x {torch.cuda.get_device_name()}",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, {first['parameters'] / 1e9:.2f}B "
        f"parameters. Command: `{shlex.join(['python', '-m', 'tools.bench.train', *argv])}`",
        "",
        *markdown_table(
            [
                "variant",
                "tokens/s",
                "to the best dense",
                "ms a step",
                *logged,
                "kernels",
                "GiB",
                "loss",
            ],
            [
                [
                    name,
                    f"{rates[name]:,.0f}",
                    "-" if best is None else f"{rates[name] / best:.3f}",
                    f"{1e3 * found.seconds:.1f}",
                    *(f"{1e3 * result['log_step']:.1f}" for _ in logged),
                    f"{1e3 * found.covered:.1f}",
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
            f"    {1e3 * s:8.2f} {n:5d}  {kernel[:90]}" for s, n, kernel in found.longest[:kernels]
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    mark = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*VARIANTS, *(name + EAGER for name in VARIANTS)]
    parser.add_argument("--shape", choices=SHAPES, default="1.2b", help="of the model")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=names,
        default=DEFAULT,
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)}, with ', eager' to run without CUDA graphs",
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=16,
        help="steps that do not count; scales come to rest in them",
    )
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument(
        "--log-steps", type=int, default=0, metavar="N", help="steps with metrics to time as well"
    )
    parser.add_argument(
        "--kernels", type=int, default=12, metavar="N", help="longest kernels to name"
    )
    parser.add_argument("--output", type=Path, help="markdown file to write")
    args = parser.parse_args(argv[:mark])
    if not torch.cuda.is_available():
        print("train.py: error: no GPU is here", file=sys.stderr)
        return 1
    return guarded("train.py", lambda: run(args, argv, argv[mark + 1 :]))


def run(args: argparse.Namespace, argv: Sequence[str], flags: Sequence[str]) -> None:
    """Measure all variants, print the tables and write them after each variant."""
    stand_alone()
    is_first = os.environ["RANK"] == "0"
    results = {}
    for name in args.variants:
        own = [*SHAPES[args.shape], *COMMON, *VARIANTS[name.removesuffix(EAGER)]]
        if name.endswith(EAGER):
            own += ["--cuda-graph-impl", "none"]
        results[name] = measure(name, [*own, *flags], args.warmup, args.steps, args.log_steps)
        text = report(results, argv, args.kernels)
        if is_first:
            rate = results[name][0]["tokens_per_second"]
            print(f"{name}: {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
        if is_first and args.output:  # what was measured is kept, should a later variant fail
            write_text(args.output, text)
    if is_first:
        print(text)
    stop_process()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
