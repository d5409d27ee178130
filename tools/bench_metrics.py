"""What the metrics cost: steps with all figures against the same steps without any.

One process trains a model of the given size on generated tokens. Every step is one of three kinds,
in turns: plain, timed (the step before a log step) and measured (a log step with the figures of all
layers, their reduction and the files). The cost of a run is that of one timed and one measured step
in each `--log-interval`. On a CPU the time is the process's own (other programs do not count), on a
GPU it is the clock's, until the device is done.

    python tools/bench_metrics.py
    python tools/bench_metrics.py --output tools/results/metrics-cpu-2026-01-01.md
    torchrun --nproc-per-node 1 tools/bench_metrics.py --rounds 40 -- --bf16 --num-layers 16 \\
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
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megasparse.config import load_config, padded_vocab_size, resolve
from megasparse.errors import MegasparseError
from megasparse.megatron.batches import batches, build_data
from megasparse.megatron.grid import make_grid
from megasparse.sparsity.recipe import recipe_of
from megasparse.train.build import build_engine
from megasparse.train.engine.deepspeed import start_process, stop_process
from megasparse.train.recorder import Recorder
from megasparse.train.state import LoopState

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
    own = ["--mock-data", "--run-dir", str(run_dir), "--train-iters", str(10 * total),
           "--log-interval", str(20 * total), "--sparsity-recipe", "fst", "--log-csv",
           "--log-layers", "--dense-tail-fraction", "0"]  # fmt: skip
    config = resolve(load_config([*own, *DEFAULT, *flags]), int(os.environ["WORLD_SIZE"]))
    device = start_process(config.parallel.distributed_timeout_minutes)
    parallel, train = config.parallel, config.train
    grid = make_grid(
        parallel.tensor_model_parallel_size,
        device,
        train.seed,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
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
        recorder.write(recorder.end(result, time.monotonic() - clock, 0, {}))
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
    with socket.socket() as probe:  # a free port, when no launcher has chosen one
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():  # fmt: skip
        os.environ.setdefault(name, value)
    try:
        with tempfile.TemporaryDirectory() as folder:
            time_of, hardware = measure(flags, options.rounds, Path(folder))
    except MegasparseError as error:
        print(f"bench_metrics.py: error: {error}", file=sys.stderr)
        return error.exit_code
    extra = {kind: time_of[kind] - time_of["plain"] for kind in KINDS[1:]}
    cost = sum(extra.values()) / (options.log_interval * time_of["plain"])
    lines = [
        "# Cost of the metrics",
        "",
        f"{hardware}, {datetime.date.today()}, torch {torch.__version__}. Command: "
        f"`python tools/bench_metrics.py {shlex.join(arguments)}`".rstrip(),
        "",
        "| step | lower quartile, ms | more than a plain one, ms |",
        "|---|---|---|",
        *(
            f"| {kind} | {1e3 * time_of[kind]:.2f} | {1e3 * extra.get(kind, 0.0):.2f} |"
            for kind in KINDS
        ),
        "",
        f"With `--log-interval {options.log_interval}` all metrics cost {cost:.2%} of the run.",
    ]
    print("\n".join(lines))
    if options.output is not None and os.environ["RANK"] == "0":
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if cost < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
