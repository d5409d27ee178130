"""Tokens/s of prefill and decode, packed 2:4 beside dense, by transformers' own `generate`.

    python -m tools.bench.generate_packed
    python -m tools.bench.generate_packed --output tools/results/generate-h200-2026-01-01.md
    python -m tools.bench.generate_packed --device cpu --size tiny --new-tokens 4   (does it run)

A Llama of random weights, pruned 2:4 in all linears but the last one, in bfloat16. Prefill is one
forward pass over the prompts; decode is `generate` (greedy, static batch) less its prefill. First
calls, which choose between packed and dense, are not timed; then the ways take turns, and the
fastest call of each counts.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import write_text
from megasparse.cli import guarded, markdown_table
from megasparse.kernels import prune24_mask
from megasparse.nn import pack_
from tools.bench.parts import llama

WAYS = ("dense", "2:4", "2:4 fp8")
# Passes until shapes are measured and the model has chosen; one more is for what torch prepares.
WARMUP = 9


@dataclass(frozen=True)
class Measured:
    """Tokens a second of one way with one number of prompts."""

    way: str
    batch: int
    prefill: float
    decode: float


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(llama.SIZES), default="8b-layers")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], metavar="PROMPTS")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="write the table to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("generate_packed", lambda: run(args))


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Measure all ways and print the table."""
    device = torch.device(args.device)
    model = llama.make(args.size, device, args.prompt + args.new_tokens).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            weight.masked_fill_(~prune24_mask(weight), 0.0)
    models = {"dense": model}
    for way in WAYS[1:]:
        models[way] = copy.deepcopy(model)
        pack_(models[way], fp8=way.endswith("fp8"))
    found = [one for batch in args.batches for one in measure(models, batch, args)]
    text = report(found, args, device)
    print(text)
    if args.output is not None:
        write_text(args.output, text + "\n")


def measure(models: dict[str, Any], batch: int, args: argparse.Namespace) -> list[Measured]:
    """Prefill and decode of all ways with some prompts."""
    device = torch.device(args.device)
    vocab = models["dense"].config.vocab_size
    prompts = torch.randint(0, vocab, (batch, args.prompt), device=device)

    def generate(model: Any, new: int) -> Callable[[], object]:
        return lambda: model.generate(
            prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )

    def forward(model: Any) -> Callable[[], object]:
        return lambda: model(prompts, logits_to_keep=1)

    new = args.new_tokens
    prefill = seconds({way: forward(model) for way, model in models.items()}, device, WARMUP)
    whole = seconds({way: generate(model, new) for way, model in models.items()}, device, 1)
    one = seconds({way: generate(model, 1) for way, model in models.items()}, device, 0)
    return [
        Measured(
            way,
            batch,
            batch * args.prompt / prefill[way],
            batch * (new - 1) / (whole[way] - one[way]),
        )
        for way in models
    ]


def seconds(
    ways: dict[str, Callable[[], object]], device: torch.device, warmup: int, rounds: int = 5
) -> dict[str, float]:
    """The fastest call of each, after some that are not timed; the ways take turns."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for work in ways.values():
        for _ in range(warmup):
            work()
    for _ in range(rounds):
        for way, work in ways.items():
            _synchronize(device)
            begin = time.perf_counter()
            work()
            _synchronize(device)
            times[way].append(time.perf_counter() - begin)
    return {way: min(found) for way, found in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(found: list[Measured], args: argparse.Namespace, device: torch.device) -> str:
    """The page."""
    dense = {one.batch: one for one in found if one.way == "dense"}
    rows = [
        [
            one.way,
            str(one.batch),
            f"{one.prefill:,.0f}",
            f"{one.prefill / dense[one.batch].prefill:.2f}",
            f"{one.decode:,.0f}",
            f"{one.decode / dense[one.batch].decode:.2f}",
        ]
        for one in found
    ]
    head = ["weights", "prompts", "prefill tokens/s", "to dense", "decode tokens/s", "to dense"]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return "\n".join(
        [
            "# Generating with packed 2:4 weights",
            "",
            f"{gpu}, torch {torch.__version__}, {datetime.date.today()}; Llama {args.size}, "
            f"prompts of {args.prompt} tokens, {args.new_tokens} new ones:",
            "",
            f"    python -m tools.bench.generate_packed {shlex.join(sys.argv[1:])}".rstrip(),
            "",
            *markdown_table(head, rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
