"""Training a transformers Llama with `sparsify_`, beside plain BF16 and torchao's float8.

    python -m tools.bench.nn_llama
    python -m tools.bench.nn_llama --output tools/results/nn-llama-h200-2026-01-01.md
    python -m tools.bench.nn_llama --device cpu --size tiny --batch 2 --sequence 16 --only bf16 fst

Random weights and tokens; bfloat16 parameters and moments, torch's fused AdamW, no recomputation.
2:4 is the FFN; in "fp8" rows the attention's linears are FP8 too, as with torchao, which converts
all linears but the last one. Compiled rows are `torch.compile` of the whole model. Steps in which
GEMMs are chosen and code is compiled are not timed; masks are searched in every 40th step.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import write_text
from megasparse.cli import guarded, markdown_table
from megasparse.errors import ConfigError
from megasparse.nn import sparsify_
from tools.bench.parts import llama

FFN, ATTENTION = ["*.mlp.*"], ["*.self_attn.*"]
# By name: recipe, FP8, compiled. "torchao" is their float8 training.
WAYS: dict[str, tuple[str | None, bool, bool]] = {
    "bf16": (None, False, False),
    "bf16 compiled": (None, False, True),
    "torchao float8 compiled": ("torchao", True, True),
    "fst": ("fst", False, False),
    "fst compiled": ("fst", False, True),
    "fst fp8": ("fst", True, False),
    "fst fp8 compiled": ("fst", True, True),
    "s_ste fp8 compiled": ("s_ste", True, True),
}


@dataclass(frozen=True)
class Measured:
    """One way: tokens/s, GiB at the peak, loss of the last step; or why it did not run."""

    way: str
    rate: float = 0.0
    memory: float = 0.0
    loss: float = 0.0
    failed: str = ""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(llama.SIZES), default="1b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="write the table to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("nn_llama", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure all ways and print the table; a way that cannot run says why in its row."""
    found = []
    for way in [name for name in WAYS if name in args.only]:
        try:
            found.append(measure(way, args))
        except (ConfigError, RuntimeError, ImportError) as error:
            found.append(Measured(way, failed=" ".join(str(error).split())[:120]))
        print(found[-1], file=sys.stderr, flush=True)
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    text = report(found, args)
    print(text)
    if args.output is not None:
        write_text(args.output, text + "\n")


def measure(way: str, args: argparse.Namespace) -> Measured:
    """Train for some steps in one way."""
    device = torch.device(args.device)
    recipe, fp8, compiled = WAYS[way]
    model: Any = llama.make(args.size, device, args.sequence).train()
    model.config.use_cache = False
    if recipe == "torchao":
        _torchao(model)
    elif recipe is not None:
        sparsify_(
            model,
            recipe,
            FFN,
            "delayed" if fp8 else None,
            fp8_layers=ATTENTION if fp8 else (),
            mask_update_interval=40,
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    net = torch.compile(model) if compiled else model
    shape = (args.batch, args.sequence)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = 0.0
    for number in range(args.warmup + args.steps):
        if number == args.warmup:
            _wait(device)
            begin = time.perf_counter()
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    rate = args.steps * args.batch * args.sequence / (time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return Measured(way, rate, memory, loss.item())


def _torchao(model: torch.nn.Module) -> None:
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(model, module_filter_fn=lambda _, name: "lm_head" not in name)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(found: list[Measured], args: argparse.Namespace) -> str:
    """The page."""
    dense = max((one.rate for one in found if one.way.startswith("bf16")), default=0.0)
    rows = []
    for one in found:
        if one.failed:
            rows.append([one.way, f"did not run: {one.failed}", "", "", ""])
            continue
        ratio = f"{one.rate / dense:.2f}" if dense else ""
        figures = [f"{one.rate:,.0f}", ratio, f"{one.memory:.1f}", f"{one.loss:.3f}"]
        rows.append([one.way, *figures])
    head = ["way", "tokens/s", "to the best BF16", "memory, GiB", "loss, last step"]
    cuda = args.device.startswith("cuda")
    gpu = torch.cuda.get_device_name(args.device) if cuda else "CPU"
    return "\n".join(
        [
            "# A transformers Llama with `megasparse.nn.sparsify_`",
            "",
            f"{gpu}, torch {torch.__version__}, {datetime.date.today()}; Llama {args.size}, "
            f"{args.batch} x {args.sequence} tokens a step:",
            "",
            f"    python -m tools.bench.nn_llama {shlex.join(sys.argv[1:])}".rstrip(),
            "",
            *markdown_table(head, rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
