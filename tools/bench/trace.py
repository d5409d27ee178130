"""A profiled step of a small model, and what its trace says: named ranges and the kernels in them.

    python -m tools.bench.trace --output tools/results/trace-h200-2026-01-01.md

Trains two layers of Llama-3-8B by FST in FP8 with `--profile`, as a user does, and reads the trace
that the run has written. The table has the ranges of the first layer's MLP, with their kernels on
the GPU. The trace itself is copied beside the table; open it at https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text
from megasparse.cli import guarded, markdown_table
from megasparse.errors import ConfigError

ROOT = Path(__file__).parents[2]
RUN = [
    "--num-layers", "2", "--hidden-size", "4096", "--ffn-hidden-size", "14336",
    "--num-attention-heads", "32", "--group-query-attention", "--num-query-groups", "8",
    "--seq-length", "4096", "--position-embedding-type", "rope", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--vocab-size",
    "32000", "--bf16", "--fp8-format", "e4m3", "--sparsity-recipe", "fst", "--sparse-layers",
    "*.mlp.*", "*.self_attention.linear_*", "--micro-batch-size", "1", "--global-batch-size", "1",
    "--mock-data", "--lr", "3e-4", "--train-iters", "12", "--eval-iters", "0", "--profile",
    "--profile-step-start", "9", "--profile-step-end", "10",
]  # fmt: skip
LAYER = "decoder.layers.0.mlp"


def ranges(events: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The ranges on the GPU in order of their start, each with the kernels that ran in it."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    found = []
    for event in events:
        if event.get("cat") != "gpu_user_annotation" or not event["name"].startswith(LAYER):
            continue
        start, end = event["ts"], event["ts"] + event["dur"]
        inside = [k for k in kernels if start <= k["ts"] and k["ts"] + k["dur"] <= end]
        found.append((event["ts"], event["name"], inside))
    return [(name, inside) for _, name, inside in sorted(found, key=lambda row: row[0])]


def report(events: list[dict[str, Any]], device: str) -> str:
    """The table."""
    rows = []
    for name, inside in ranges(events):
        names = sorted({kernel["name"].split("<")[0][:60] for kernel in inside})
        total = sum(kernel["dur"] for kernel in inside)
        rows.append([f"`{name}`", f"{total:,.0f}", str(len(inside)), ", ".join(names)])
    if not rows:
        raise ConfigError(f"the trace has no range of {LAYER} on a GPU")
    lines = [
        "# Ranges of a profiled step, and their kernels",
        "",
        f"{device}. `python -m tools.bench.trace`: the MLP of the first of two layers of",
        "Llama-3-8B, 1 x 4096 tokens, FST in FP8; one step, eager, as `--profile` runs it.",
        "",
        *markdown_table(["range", "us of kernels", "kernels", "their names"], rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="the table; the trace is put beside it")
    args = parser.parse_args(argv)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        flags = [*RUN, "--run-dir", folder]
        command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *flags]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
        if done.returncode != 0:
            raise ConfigError(f"{shlex.join(command)} ended with {done.returncode}")
        (trace,) = Path(folder, "profile").glob("*.json.gz")
        with gzip.open(trace, "rt") as file:
            content = json.load(file)
        properties = content.get("deviceProperties") or [{"name": "no GPU"}]
        text = report(content["traceEvents"], properties[0]["name"])
        if args.output is None:
            print(text)
        else:
            write_text(args.output, text)
            shutil.copy(trace, args.output.with_suffix(".json.gz"))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("trace", main))
