"""Quantize a trained model to 4 bits or FP8; what is 2:4 is packed, and its zeros stay.

    python tools/quantize.py --load runs/ast/checkpoints --output runs/ast-int4 --format int4

Linears of the blocks are quantized (int4: a scale for every --group-size inputs, with activation-
aware scaling as in AWQ, folded into the operation before; fp8: e4m3, a scale a row), everything
else is stored in 16 bits, SLoRB's matrices too. Writes model.safetensors and quantization.json into
a new folder, reads them back, and prints what the model takes, metadata and scales included. Exit
codes are those of launch/pretrain.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasparse.megatron.import_without_compile import import_megatron

import_megatron()  # before the imports that need it

from megasparse.cli import guarded
from megasparse.compress.quantize import FORMATS
from megasparse.errors import ConfigError
from megasparse.inference.offline import OfflineModel, StoredRun
from megasparse.inference.quantized_model import (
    ModelQuantizer,
    read_quantized,
    sizes,
    write_quantized,
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return guarded("quantize.py", lambda: print(table(run(args))))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, help="checkpoints of a run")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--format", choices=FORMATS, default="int4")
    parser.add_argument("--group-size", type=int, default=128, help="inputs a scale, int4")
    parser.add_argument("--awq", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--calibration-samples", type=int, default=64, help="sequences")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="sequences at once")
    parser.add_argument("--data-path", nargs="+", help="calibration data; default the run's")
    parser.add_argument("--eval-iters", type=int, default=0, help="micro-batches of validation")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Quantize, write, read back; sizes in bytes, and validation losses if asked for.

    Raises:
        ConfigError: the output exists.
    """
    if args.output.exists():
        raise ConfigError(f"output: {args.output} exists, expected a new folder")
    stored = StoredRun(args.load)
    model = OfflineModel(stored, args.data_path, args.micro_batch_size)
    model.put(stored.folded())
    quantizer = ModelQuantizer(stored, args.format, args.group_size, args.awq)
    report: dict[str, Any] = {"format": args.format, "group_size": args.group_size}
    report["alphas"] = quantizer.alphas
    if args.eval_iters:
        report["loss_before"] = model.loss(args.eval_iters)
    batches = -(-args.calibration_samples // args.micro_batch_size)
    count = max(1, batches) if quantizer.scaled else 1
    model.calibrate(count, quantizer.layer, gram=quantizer.scaled)
    rest = {n: w.half() for n, w in model.take().items() if n not in quantizer.shapes}
    report["sizes"] = sizes(stored, quantizer.tensors, rest)
    report["shapes"] = {name: list(shape) for name, shape in quantizer.shapes.items()}
    write_quantized(args.output, {**quantizer.tensors, **rest}, report)
    if args.eval_iters:
        model.put(read_quantized(args.output))
        report["loss_after"] = model.loss(args.eval_iters)
    return report


def table(report: dict[str, Any]) -> str:
    """The sizes as text."""
    found = report["sizes"]
    lines = [f"{report['format']}, MiB (and times smaller than dense FP32, FP16)"]
    for name, size in found.items():
        line = f"  {name:<18} {size / 2**20:10.3f}"
        if name == "total":
            line += f"   {found['dense FP32'] / size:.2f}x  {found['dense FP16'] / size:.2f}x"
        if name == "linears":
            times = found["linears FP32"] / size
            line += f"   {times:.2f}x  {times / 2:.2f}x"
        lines.append(line)
    for key in ("loss_before", "loss_after"):
        if key in report:
            loss = report[key]
            lines.append(f"  {key:<18} {loss:10.4f}   perplexity {math.exp(loss):.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
