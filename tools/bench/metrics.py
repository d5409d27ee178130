"""What the metrics cost: steps with all figures against the same steps without any.

One process trains a model of the given size on generated tokens. Every step is one of three kinds,
in turns: plain, timed (the step before a log step) and measured (a log step with the figures of all
layers, their reduction and the files). The cost of a run is that of one timed and one measured step
in each `--log-interval`. On a CPU the time is the process's own (other programs do not count), on a
GPU it is the clock's, until the device is done.

    python -m tools.bench.metrics
    python -m tools.bench.metrics --output tools/results/metrics-cpu-2026-01-01.md
    torchrun --nproc-per-node 1 -m tools.bench.metrics --rounds 40 -- --bf16 --num-layers 16 \\
        --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 16 --seq-length 2048 \\
        --micro-batch-size 4

Flags after `--` are those of launch/pretrain.py. The exit code is 1 when the cost is above 1 %.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megasparse.atomic_files import write_text
from megasparse.cli import guarded, markdown_table
from megasparse.config import load_config, padded_vocab_size, resolve
from megasparse.megatron.data.batches import batches, build_data
from megasparse.megatron.grid import make_grid
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.train.build import build_engine
from megasparse.train.engine.deepspeed import start_process, stop_process
from megasparse.train.recorder import Recorder
from megasparse.train.state import LoopState
from tools.bench.parts.short_runs import stand_alone

LIMIT = 0.01
DEFAULT = [
    "--num-layers", "4", "--hidden-size", "256", "--ffn-hidden-size", "704",
    "--num-attention-heads", "8", "--num-query-groups", "4", "--seq-length", "256",
    "--micro-batch-size", "4", "--global-batch-size", "8", "--position-embedding-type", "rope",
    "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
    "--untie-embeddings-and-output-weights", "--vocab-size", "2048",
    "--mask-update-interval", "10",
]  # fmt: skip
KINDS = ("plain", "timed", "measured")


def measure(flags: Sequence[str], rounds: int, run_dir: Path) -> tuple[dict[str, float], str]:
    """Seconds of each kind of step, lower quartile, and the hardware."""
    total = 3 * (rounds + 2)
    # Kinds are chosen here, not by the log interval.
    own = [
        "--mock-data",
        "--sparsity-recipe",
        "fst",
        "--log-csv",
        "--log-layers",
        "--dense-tail-fraction",
        "0",
    ]
    own += ["--train-iters", str(10 * total), "--log-interval", str(20 * total)]
    own += ["--run-dir", str(run_dir)]
    config = resolve(load_config([*own, *DEFAULT, *flags]), int(os.environ["WORLD_SIZE"]))
    device = start_process(config.parallel.distributed_timeout_minutes)
    parallel, train = config.parallel, config.train
    grid = make_grid(
        parallel.tensor_model_parallel_size,
        device,
        train.seed,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
    )
    data = build_data(config, grid)
    vocabulary, recipe = padded_vocab_size(data.vocab_size, config), recipe_of(config)
    engine = build_engine(config, grid, recipe, vocabulary)
    recorder = Recorder(config, engine, recipe, vocabulary, LoopState())
    recorder.open()
    stream = engine.timer.waiting_for(batches(data.streams["train"], config, grid, 0))
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    for number in range(total):
        kind = KINDS[number % 3]
        step = engine.controller.clock.step + 1
        recorder.only_log = {"plain": (), "timed": (step + 1,), "measured": (step,)}[kind]
        begin, clock = now(), time.monotonic()
        recorder.begin()
        result = engine.train_step(stream)
        recorder.write(recorder.end(result, time.monotonic() - clock, {}))
        if number >= 6:
            seconds[kind].append(now() - begin)
    recorder.close()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    hardware = gpu or f"{os.cpu_count()}-core CPU machine, {platform.machine()}"
    stop_process()
    # The lower quartile: other programs slow a step down, nothing makes it faster.
    quartile = {kind: sorted(values)[len(values) // 4] for kind, values in seconds.items()}
    return quartile, hardware


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    mark = arguments.index("--") if "--" in arguments else len(arguments)
    flags = arguments[mark + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind")
    parser.add_argument("--log-interval", type=int, default=10, help="that the cost is for")
    parser.add_argument("--output", type=Path, help="Markdown file")
    options = parser.parse_args(arguments[:mark])
    return guarded("metrics.py", lambda: run(options, flags, arguments))


def run(options: argparse.Namespace, flags: Sequence[str], arguments: Sequence[str]) -> int:
    """Measure, print the table and write it; 1 if the metrics cost too much, else 0."""
    stand_alone()
    with tempfile.TemporaryDirectory() as folder:
        time_of, hardware = measure(flags, options.rounds, Path(folder))
    extra = {kind: time_of[kind] - time_of["plain"] for kind in KINDS[1:]}
    cost = sum(extra.values()) / (options.log_interval * time_of["plain"])
    lines = [
        "# Cost of the metrics",
        "",
        f"{hardware}, {datetime.date.today()}, torch {torch.__version__}. Command: "
        f"`python -m tools.bench.metrics {shlex.join(arguments)}`".rstrip(),
        "",
        *markdown_table(
            ["step", "lower quartile, ms", "more than a plain one, ms"],
            [
                [kind, f"{1e3 * time_of[kind]:.2f}", f"{1e3 * extra.get(kind, 0.0):.2f}"]
                for kind in KINDS
            ],
        ),
        "",
        f"With `--log-interval {options.log_interval}` all metrics cost {cost:.2%} of the run.",
    ]
    print("\n".join(lines))
    if options.output is not None and os.environ["RANK"] == "0":
        write_text(options.output, "\n".join(lines) + "\n")
    return 0 if cost < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
