"""Compare layouts on several GPUs: the same losses, and how many tokens a second.

Two parts, each against one GPU in the same command, each with a dense and a sparse run:

* the matrix: a small model over tensor, sequence, pipeline, data parallel and ZeRO, and what of
  them fits together. Losses of every step must agree with one GPU's within the stated tolerance
  (BF16 rounds differently in another order of sums, and masks that are refreshed amplify it: how
  far that goes on one GPU, the row with another micro-batch size says), and the samples must be the
  same;
* scaling: a model of more than 1B parameters with the same global batch in every layout (strong
  scaling): tokens a second, and efficiency = tokens/s / (GPUs x tokens/s of one GPU).

Ranks are started from here by torch.distributed.run: once for the matrix on every number of GPUs,
once for every layout of the scaling, dense beside sparse in the same processes. What takes fewer
GPUs than there are runs beside its like. With --output a command that was cut off goes on when it
is given again (until the table is written, finished runs lie in the folder OUTPUT with .runs). The
exit code is 1 when a layout disagrees.

    python -m tools.bench.scaling --output tools/results/scaling-h200x2.md
    python -m tools.bench.scaling --part scaling --recipe s_ste
    python -m tools.bench.scaling --device cpu --tiny --ranks 2      (does it run at all)
"""

from __future__ import annotations

import argparse
import datetime
import queue
import shlex
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_text
from megasparse.cli import markdown_table
from tools.bench.parts.short_runs import Job, Result, launch
from tools.experiments.run_queue import visible_gpus

TOLERANCE = 5e-3  # relative, of a BF16 loss
TP2 = ["--tensor-model-parallel-size", "2"]
TP4 = ["--tensor-model-parallel-size", "4"]
PP2 = ["--pipeline-model-parallel-size", "2"]
PP4 = ["--pipeline-model-parallel-size", "4"]
SP = ["--sequence-parallel"]
FULL = ["--recompute-granularity", "full"]
ZERO2 = ["--zero-stage", "2"]
ZERO3 = ["--zero-stage", "3"]

# name: (GPUs, flags); ZeRO-1 unless said otherwise.
MATRIX = {
    "one": (1, []),
    "one, micro-batch 1": (1, ["--micro-batch-size", "1"]),  # rounding alone: no layout
    "recompute full": (1, FULL),
    "tp 2": (2, TP2),
    "tp 2, sp": (2, [*TP2, *SP]),
    "pp 2": (2, PP2),
    "pp 2, recompute full": (2, [*PP2, *FULL]),
    "dp 2": (2, []),
    "dp 2, zero 2": (2, ZERO2),
    "dp 2, zero 3": (2, ZERO3),
    "tp 4": (4, TP4),
    "tp 4, sp, recompute full": (4, [*TP4, *SP, *FULL]),
    "pp 4": (4, PP4),
    "dp 4, zero 2": (4, ZERO2),
    "tp 2, pp 2": (4, [*TP2, *PP2]),
    "tp 2, sp, pp 2": (4, [*TP2, *SP, *PP2]),
    "tp 2, sp, dp 2": (4, [*TP2, *SP]),
    "pp 2, dp 2": (4, PP2),
    "tp 2, sp, dp 2, zero 3": (4, [*TP2, *SP, *ZERO3]),
}
SCALING = {
    "one": (1, []),
    "tp 2, sp": (2, [*TP2, *SP]),
    "pp 2": (2, PP2),
    "dp 2": (2, []),
    "tp 4, sp": (4, [*TP4, *SP]),
    "dp 4": (4, []),
    "tp 2, sp, pp 2": (4, [*TP2, *SP, *PP2]),
}

LLAMA = [
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu",
    "--disable-bias-linear", "--untie-embeddings-and-output-weights",
]  # fmt: skip
MODELS = {
    "matrix": [
        *LLAMA, "--num-layers", "4", "--hidden-size", "512", "--ffn-hidden-size", "1536",
        "--num-attention-heads", "8", "--num-query-groups", "4", "--seq-length", "512",
        "--vocab-size", "1000", "--micro-batch-size", "2", "--global-batch-size", "16",
        "--lr", "1e-4",  # higher, and rounding alone would exceed the tolerance with FST
    ],
    "scaling": [
        *LLAMA, "--num-layers", "16", "--hidden-size", "2048", "--ffn-hidden-size", "8192",
        "--num-attention-heads", "16", "--seq-length", "2048", "--vocab-size", "32000",
        "--micro-batch-size", "8", "--global-batch-size", "64", "--lr", "2e-5",
    ],
}  # fmt: skip
TINY = [
    *LLAMA, "--num-layers", "4", "--hidden-size", "32", "--ffn-hidden-size", "64",
    "--num-attention-heads", "4", "--seq-length", "16", "--vocab-size", "100",
    "--micro-batch-size", "1", "--global-batch-size", "8", "--lr", "3e-4",
]  # fmt: skip


def make_jobs(args: argparse.Namespace) -> dict[int, dict[str, Job]]:
    """Jobs by number of ranks, named `part/recipe/layout`."""
    jobs: dict[int, dict[str, Job]] = {}
    for part, layouts in (("matrix", MATRIX), ("scaling", SCALING)):
        if args.part not in (part, "all"):
            continue
        steps = args.matrix_steps if part == "matrix" else args.warmup + args.steps
        for recipe in (args.recipe, "dense"):  # first what is more in doubt
            for name, (ranks, flags) in layouts.items():
                if ranks > args.ranks or (args.layouts and name not in ["one", *args.layouts]):
                    continue
                stage = [] if "--zero-stage" in flags else ["--zero-stage", "1"]
                jobs.setdefault(ranks, {})[f"{part}/{recipe}/{name}"] = {
                    "steps": steps,
                    "profile": part == "scaling",
                    "flags": [
                        *(TINY if args.tiny else MODELS[part]),
                        "--bf16",
                        "--mock-data",
                        "--eval-iters",
                        "0",
                        "--train-iters",
                        str(1000),
                        "--seed",
                        str(args.seed),
                        "--sparsity-recipe",
                        recipe,
                        *flags,
                        *stage,
                    ],
                }
    return jobs


def matrix_table(results: dict[str, Any], recipe: str) -> tuple[list[str], bool]:
    """Lines of the table, and whether every layout agrees with one GPU."""
    columns = ["layout", "ranks", "recipe", "last loss", "largest difference", "samples", ""]
    rows, good = [], True
    for name, (ranks, _) in MATRIX.items():
        for method in ("dense", recipe):
            run = results.get(f"matrix/{method}/{name}")
            if run is None:
                continue
            one = results[f"matrix/{method}/one"]
            pairs = zip(run["losses"], one["losses"], strict=True)
            worst = max(abs(a - b) / abs(b) for a, b in pairs)
            same = run["samples"] == one["samples"]
            ok = worst <= TOLERANCE and same
            good &= ok
            figures = [f"{run['losses'][-1]:.5f}", f"{worst:.1e}"]
            words = ["same" if same else "OTHERS", "ok" if ok else "FAILED"]
            rows.append([name, ranks, method, *figures, *words])
    return markdown_table(columns, rows, text_columns=7), good


def scaling_table(results: dict[str, Any], recipe: str, warmup: int) -> list[str]:
    """A line a layout: tokens a second, memory and last loss, dense beside the recipe."""
    columns = ["layout", "GPUs", "dense tokens/s", "efficiency", f"{recipe} tokens/s", "efficiency"]
    columns += [f"{recipe} / dense", "GiB dense", f"GiB {recipe}", "loss dense", f"loss {recipe}"]
    rows = []

    def speed(name: str, method: str) -> float:
        run = results[f"scaling/{method}/{name}"]
        return run["tokens"] / statistics.median(run["seconds"][warmup:])

    for name, (ranks, _) in SCALING.items():
        if f"scaling/dense/{name}" not in results:
            continue
        cells = [name, str(ranks)]
        for method in ("dense", recipe):
            rate = speed(name, method)
            cells += [f"{rate:,.0f}", f"{rate / (ranks * speed('one', method)):.0%}"]
        runs = [results[f"scaling/{method}/{name}"] for method in ("dense", recipe)]
        cells.append(f"{speed(name, recipe) / speed(name, 'dense'):.2f}")
        cells += [f"{run['memory']:.1f}" for run in runs]
        cells += [f"{run['losses'][-1]:.4f}" for run in runs]
        rows.append(cells)
    return markdown_table(columns, rows)


def time_table(results: dict[str, Any], recipe: str, warmup: int) -> list[str]:
    """Where a step of the first rank goes."""
    columns = ["layout", "GPUs", "recipe", "ms a step", "computing", "communication alone"]
    rows = []
    for name, (ranks, _) in SCALING.items():
        for method in ("dense", recipe):
            run = results.get(f"scaling/{method}/{name}")
            if run is None or "covered" not in run:
                continue
            step = statistics.median(run["seconds"][warmup:])
            parts = (run["computing"], run["covered"] - run["computing"], step - run["covered"])
            shares = [f"{1e3 * part:.0f} ({part / step:.0%})" for part in parts]
            rows.append([name, ranks, method, f"{1e3 * step:.0f}", *shares])
    return markdown_table([*columns, "neither"], rows, text_columns=3)


def report(results: dict[str, Any], args: argparse.Namespace) -> tuple[str, bool]:
    """The whole text in markdown, and whether everything agrees."""
    any_run = next(iter(results.values()))
    lines = [
        f"# Layouts on {args.gpus} x {any_run['hardware']}"
        f"{f', shared by {args.ranks} ranks' if args.ranks > args.gpus else ''}",
        "",
        f"{datetime.date.today()}, torch {any_run['torch']}, BF16, "
        f"`{shlex.join(['python', '-m', 'tools.bench.scaling', *args.argv])}`",
    ]
    good = True
    if args.part in ("matrix", "all"):
        table, good = matrix_table(results, args.recipe)
        lines += [
            "",
            f"## The same losses ({args.matrix_steps} steps, tolerance {TOLERANCE:g} relative to "
            "one GPU in every step)",
            "",
            *table,
        ]
    if args.part in ("scaling", "all"):
        one = results["scaling/dense/one"]
        lines += [
            "",
            f"## Scaling ({one['parameters'] / 1e9:.2f}B parameters, {one['tokens']:,} tokens a "
            f"step in every layout, median of {args.steps} steps after {args.warmup})",
            "",
            "Where masks are refreshed every several steps, the refresh falls into the warm-up. "
            "GiB: peak of the first rank.",
            "",
            *scaling_table(results, args.recipe, args.warmup),
        ]
        if "covered" in one:
            lines += [
                "",
                "Milliseconds of a step on the first GPU, kernels' times from a profile of one "
                "step after the timed ones: any kernel but communication; communication beside no "
                "other kernel (waiting for other GPUs is in it); neither, which is the host's work "
                "and a pipeline's bubbles:",
                "",
                *time_table(results, args.recipe, args.warmup),
            ]
    return "\n".join(lines) + "\n", good


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("matrix", "scaling", "all"), default="all")
    parser.add_argument("--recipe", default="fst", help="the sparse method (default fst)")
    parser.add_argument("--ranks", type=int, help="GPUs to use, 1, 2 or 4 (default: all here)")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=sorted(MATRIX | SCALING),
        help="these and one GPU (default: all)",
    )
    parser.add_argument(
        "--share-gpus",
        action="store_true",
        help="run the matrix on more --ranks than there are GPUs",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of toy size in both parts")
    parser.add_argument("--matrix-steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="steps of scaling that do not count")
    parser.add_argument("--steps", type=int, default=6, help="steps of scaling that are timed")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--output", type=Path, help="markdown file to write")
    args = parser.parse_args(argv)
    args.argv, args.gpus = argv, args.ranks
    return args


def run_all(args: argparse.Namespace, folder: Path | None) -> dict[str, Result]:
    """Everything that was asked for, by the name of its job."""
    gpus = visible_gpus()[: args.gpus] if args.device == "cuda" else []
    results: dict[str, Result] = {}
    for ranks, jobs in sorted(make_jobs(args).items()):
        # Small runs share their processes; a large layout has its own.
        groups: dict[str, dict[str, Job]] = {}
        for name, job in jobs.items():
            part, _, layout = name.split("/")
            groups.setdefault(part if part == "matrix" else layout, {})[name] = job
        places: queue.Queue[list[str]] = queue.Queue()
        for first in range(0, max(len(gpus), 1), ranks):
            places.put(gpus[first : first + ranks])

        def run(group: dict[str, Job], ranks=ranks, places=places) -> dict[str, Result]:
            place = places.get()
            try:
                return launch(group, ranks, args.device, folder, place)
            finally:
                places.put(place)

        with ThreadPoolExecutor(places.qsize()) as pool:
            for found in pool.map(run, groups.values()):
                results |= found
    return results


def main(argv: list[str]) -> int:
    args = parse(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --tiny shows that the tool runs")
    here = torch.cuda.device_count() if args.device == "cuda" else 4
    args.ranks = max(n for n in (1, 2, 4) if n <= (args.ranks or here))
    if args.ranks > here and not (args.share_gpus and args.part == "matrix"):
        raise SystemExit(
            f"--ranks {args.ranks}, found {here} GPUs; --part matrix --share-gpus would share them"
        )
    args.gpus = min(args.ranks, here)
    folder = args.output.with_suffix(".runs") if args.output else None
    results = run_all(args, folder)
    text, good = report(results, args)
    print(text)
    if args.output:
        write_text(args.output, text)
    if folder:
        shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
