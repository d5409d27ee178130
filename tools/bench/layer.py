"""One Transformer layer, forward and backward: 2:4 beside Transformer Engine's dense layers.

    python -m tools.bench.layer --output tools/results/layer-h200-2026-01-01.md
    python -m tools.bench.layer --variants "te fp8" "fst fp8" --parts layer

The layer is Llama-3-8B's: hidden 4096, FFN 14336, 32 heads, 8 groups, 4 sequences of 4096 tokens,
BF16 outside of the GEMMs. A step is 8 micro-batches: operands of weights are prepared (and masks
refreshed, every `--mask-update-interval` steps) in the first of them, as in training; a time is a
step's eighth. All variants are measured in turns, several rounds, in one process; the median
counts. Optimizers are left out on both sides. `ffn` is the norm and the MLP alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import write_text
from megasparse.cli import guarded, markdown_table
from megasparse.config import load_config, resolve
from megasparse.fp8 import Scaling
from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling
from megasparse.fp8.transformer_engine import refusal
from megasparse.megatron.grid import make_grid
from megasparse.megatron.sparsify import sparsify
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.train.engine.deepspeed import start_process, stop_process
from tools.bench.parts.profiling import Profile, profiled, table
from tools.bench.parts.short_runs import stand_alone
from tools.bench.parts.single_layer import build_layer, rotary_frequencies
from tools.bench.parts.te_baseline import te_module

SEQUENCES, LENGTH, HIDDEN, FFN, HEADS, GROUPS = 4, 4096, 4096, 14336, 32, 8
MICRO_BATCHES = 8
MODEL = [
    "--num-layers", "1", "--hidden-size", str(HIDDEN), "--ffn-hidden-size", str(FFN),
    "--num-attention-heads", str(HEADS), "--group-query-attention", "--num-query-groups",
    str(GROUPS), "--seq-length", str(LENGTH), "--position-embedding-type", "rope",
    "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--vocab-size", "32000",
    "--mock-data", "--bf16", "--sparse-layers", "*.mlp.*", "*.self_attention.linear_*",
    "--train-iters", "100000",
]  # fmt: skip
FST = ["--sparsity-recipe", "fst", "--dense-tail-fraction", "0"]
S_STE = ["--sparsity-recipe", "s_ste"]
S_STE_3 = ["--sparsity-recipe", "s_ste_3"]
FP8 = ["--fp8-format", "e4m3"]
OURS = {
    "dense": ["--sparsity-recipe", "dense"],
    "fst": FST,
    "fst fp8": [*FST, *FP8],
    "fst fp8 current": [*FST, *FP8, "--fp8-recipe", "tensorwise"],
    "s_ste": S_STE,
    "s_ste fp8": [*S_STE, *FP8],
    "s_ste_3": S_STE_3,
    "s_ste_3 fp8": [*S_STE_3, *FP8],
}
VARIANTS = ["te bf16", "te fp8", *OURS]


@dataclass
class Subject:
    """What is measured: `run(x, first)` gives the output of one micro-batch."""

    run: Callable[[torch.Tensor, bool], torch.Tensor]
    parameters: list[torch.nn.Parameter]
    finish: Callable[[], None]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def step(self, x: torch.Tensor, dz: torch.Tensor) -> None:
        """All micro-batches of an optimizer step."""
        for number in range(MICRO_BATCHES):
            x.grad = None
            with self.around():
                z = self.run(x, number == 0)
            z.backward(dz)
        for parameter in self.parameters:
            parameter.grad = None
        self.finish()


def transformer_engine(fp8: bool, part: str, device: torch.device) -> Subject:
    """Transformer Engine's own layer, or its norm and MLP."""
    module, around = te_module(part, fp8, (HIDDEN, FFN, HEADS, GROUPS), device)
    if part == "ffn":

        def run(x: torch.Tensor, first: bool) -> torch.Tensor:
            return module(x, is_first_microbatch=first)

    else:
        angles = rotary_frequencies(LENGTH, HIDDEN // HEADS, device)

        def run(x: torch.Tensor, first: bool) -> torch.Tensor:
            return module(x, rotary_pos_emb=angles, is_first_microbatch=first)

    return Subject(run, list(module.parameters()), lambda: None, around)


def megasparse(flags: Sequence[str], part: str, interval: int, device: torch.device) -> Subject:
    """The layer that the trainer builds, with the recipe of the flags."""
    every = ["--mask-update-interval", str(interval)] if "fst" in flags else []
    config = resolve(load_config([*MODEL, *flags, *every]), 1)
    model, layer = build_layer(config, device)
    scales: Scaling | None = None
    if config.fp8.fp8_format:
        current = config.fp8.fp8_recipe == "tensorwise"
        scales = CurrentScaling() if current else DelayedScaling(device)
    recipe, clock = recipe_of(config), Clock(1, config.train.train_iters)
    controller = sparsify(model, recipe, clock, fp8=scales)
    angles = rotary_frequencies(LENGTH, HIDDEN // HEADS, device)

    def run(x: torch.Tensor, first: bool) -> torch.Tensor:
        if part == "ffn":
            return layer.mlp(layer.pre_mlp_layernorm(x))[0]
        return layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)[0]

    def finish() -> None:
        controller.finish_step()
        clock.step += 1

    used = layer.mlp if part == "ffn" else layer
    return Subject(run, list(used.parameters()), finish)


def make(name: str, part: str, interval: int, device: torch.device) -> Subject:
    """The subject of a variant's name."""
    if name.startswith("te "):
        return transformer_engine(name == "te fp8", part, device)
    return megasparse(OURS[name], part, interval, device)


def milliseconds(subject: Subject, x: torch.Tensor, dz: torch.Tensor, steps: int) -> float:
    """Device time of a micro-batch, over `steps` steps back to back."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(steps):
        subject.step(x, dz)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / steps / MICRO_BATCHES


def measure(
    part: str, names: Sequence[str], args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, float], dict[str, float], dict[str, Profile]]:
    """Milliseconds, peak GiB beyond the parameters, and kernels, of every variant."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (LENGTH, SEQUENCES, HIDDEN)
    x, dz = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(2))
    x.requires_grad_()
    subjects = {name: make(name, part, args.mask_update_interval, device) for name in names}
    memory, profiles = {}, {}
    for name, subject in subjects.items():
        subject.step(x, dz)  # kernels are compiled and algorithms searched
        subject.step(x, dz)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject.step(x, dz)
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        profiles[name] = profiled(lambda s=subject: s.step(x, dz), 1)  # type: ignore[misc]
        print(f"{part}, {name}: ready", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, subject in subjects.items():
            times[name].append(milliseconds(subject, x, dz, args.steps))
    found = {name: statistics.median(values) for name, values in times.items()}
    for name, profile in profiles.items():
        profile.scale(1 / MICRO_BATCHES)
        profile.seconds = found[name] / 1e3
    return found, memory, profiles


def report(part: str, results: tuple[Any, ...]) -> list[str]:
    """A part's tables."""
    times, memory, profiles = results
    bases = [name for name in ("te bf16", "te fp8", "dense") if name in times]
    lines = [
        f"## {'The whole layer' if part == 'layer' else 'Norm and MLP'}",
        "",
        "Times faster than the column's name; GiB: peak of a step beyond what lies there before.",
        "",
        *markdown_table(
            ["variant", "ms", *(f"x {base}" for base in bases), "GiB"],
            [
                [
                    name,
                    f"{ms:.2f}",
                    *(f"{times[base] / ms:.3f}" for base in bases),
                    f"{memory[name]:.2f}",
                ]
                for name, ms in times.items()
            ],
        ),
    ]
    lines += ["", *table(profiles)]
    for name, profile in profiles.items():
        lines += ["", f"Longest kernels of {name} (ms a micro-batch, launches a step):", ""]
        for seconds, launches, kernel in profile.longest[:14]:
            lines.append(f"    {1e3 * seconds:8.3f} {launches:5d}  {kernel[:90]}")
    return [*lines, ""]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--parts", nargs="+", choices=("layer", "ffn"), default=("layer", "ffn"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of all variants")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--mask-update-interval", type=int, default=1, help="of fst, in steps")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    args = parser.parse_args(argv)
    reason = refusal(torch.device("cuda", 0)) if torch.cuda.is_available() else "no GPU is here"
    if reason is not None:
        print(f"layer.py: error: {reason}", file=sys.stderr)
        return 1
    return guarded("layer.py", lambda: run(args, argv))


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure all parts, print the tables and write them after each part."""
    stand_alone()
    lines = [
        f"# One Llama-3-8B layer on {torch.cuda.get_device_name()}",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, {SEQUENCES} x {LENGTH} tokens, "
        f"{MICRO_BATCHES} micro-batches a step. Command: "
        f"`{shlex.join(['python', '-m', 'tools.bench.layer', *argv])}`",
        "",
    ]
    device = torch.device("cuda", 0)
    make_grid(1, start_process(10.0), 1)
    for part in args.parts:
        lines += report(part, measure(part, args.variants, args, device))
        if args.output:
            write_text(args.output, "\n".join(lines))
    print("\n".join(lines))
    stop_process()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
