"""Quantise a trained model to 4 bits or FP8; what is 2:4 is packed, and its zeros stay.

    python tools/quantize.py --load runs/ast/checkpoints --output runs/ast-int4 --format int4

Linears of the blocks are quantised (int4: a scale for every --group-size inputs, with activation-
aware scaling as in AWQ, folded into the operation before; fp8: e4m3, a scale a row), everything
else is stored in 16 bits, SLoRB's matrices too. Writes model.safetensors and quantization.json into
a new folder, reads them back, and prints what the model takes, metadata and scales included. Exit
codes are those of launch/pretrain.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from megasparse.megatron.import_without_compile import import_megatron

import_megatron()  # before the imports that need it

import torch
from safetensors.torch import load_file, save_file

from megasparse import log
from megasparse.atomic_files import new_folder, write_json
from megasparse.compress.folding import ORDER, norm_before, rows_before
from megasparse.compress.quantize import FORMATS, Quantized, awq_scales, quantize
from megasparse.errors import ConfigError, MegasparseError, StorageError
from megasparse.inference.offline import LowRank, OfflineModel, StoredRun
from megasparse.kernels import prune24_mask
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.slorb import initial_projection

WEIGHTS, DESCRIPTION = "model.safetensors", "quantization.json"
PARTS = ("values", "scales", "places", "slorb_adapter", "slorb_projection")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        report = run(args)
    except MegasparseError as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    print(table(report))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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


def run(args: argparse.Namespace) -> dict:
    """Quantise, write, read back; sizes in bytes, and validation losses if asked for."""
    log.setup(0)
    if args.output.exists():
        raise ConfigError(f"output: {args.output} exists, expected a new folder")
    stored = StoredRun(args.load)
    model = OfflineModel(stored, args.data_path, args.micro_batch_size)
    model.put(stored.folded())
    report: dict = {"format": args.format, "group_size": args.group_size, "alphas": {}}
    if args.eval_iters:
        report["loss_before"] = model.loss(args.eval_iters)
    work = Work(stored, args, report["alphas"])
    scaled = args.awq and args.format == "int4"
    count = max(1, -(-args.calibration_samples // args.micro_batch_size)) if scaled else 1
    model.calibrate(count, work.layer, gram=scaled)
    rest = {n: w.half() for n, w in model.take().items() if n not in work.shapes}
    report["sizes"] = sizes(stored, work.tensors, rest)
    report["shapes"] = {name: list(shape) for name, shape in work.shapes.items()}
    write(args.output, {**work.tensors, **rest}, report)
    if args.eval_iters:
        model.put(read_quantized(args.output))
        report["loss_after"] = model.loss(args.eval_iters)
    return report


class Work:
    """Quantises layer after layer.

    Attributes:
        tensors: what is stored, by name.
        shapes: of the quantised weights.
    """

    def __init__(self, stored: StoredRun, args: argparse.Namespace, alphas: dict) -> None:
        self.stored, self.args, self.alphas = stored, args, alphas
        self.tensors: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}

    def layer(self, layer_name, layer, inputs):
        """Scale, fold, quantise one layer, and let the model go on with the result."""
        device = next(layer.parameters()).device
        weights, low_rank = {}, {}
        for name in inputs:
            full = f"{layer_name}.{name}.weight"
            weights[name] = self.stored.weights[full].to(device)
            if full in self.stored.low_rank:
                low_rank[name] = on_device(self.stored.low_rank[full], weights[name])
        masks = {n: prune24_mask(w) for n, w in weights.items()
                 if f"{layer_name}.{n}.weight" in self.stored.sparse}  # fmt: skip
        if self.args.awq and self.args.format == "int4":
            for name in (n for n in ORDER if n in inputs):
                self._scale(name, layer_name, layer, inputs[name], weights, low_rank)
        for name, weight in weights.items():
            full = f"{layer_name}.{name}"
            codes = quantize(weight, self.args.format, self.args.group_size, masks.get(name))
            parts = codes.pack()
            result = codes.dequantize()
            if name in low_rank:
                branch = low_rank[name]
                parts["slorb_adapter"] = branch.adapter.half()
                parts["slorb_projection"] = branch.projection.half()
                result = LowRank(branch.adapter.half().float(), branch.projection.half().float())
                result = result.fold_into(codes.dequantize())
            for part, tensor in parts.items():
                self.tensors[f"{full}.{part}"] = tensor.cpu().contiguous()
            self.shapes[f"{full}.weight"] = weight.shape
            layer.get_submodule(name).weight.copy_(result)

    def _scale(self, name, layer_name, layer, seen, weights, low_rank):
        before = rows_before(name, self.stored.config.model)
        norm = norm_before(name)
        if before is None and norm is None:
            return
        scales, alpha = awq_scales(
            weights[name], seen.gram, seen.mean_abs, self.args.group_size
        )  # fmt: skip
        self.alphas[f"{layer_name}.{name}"] = alpha
        weights[name] = weights[name] * scales
        if name in low_rank:
            old = low_rank[name]
            low_rank[name] = LowRank(old.adapter, old.projection * scales)
        if norm is not None:
            for parameter in layer.get_submodule(norm).parameters():
                parameter.div_(scales)
            return
        source, rows = before
        rows = rows.to(scales.device)
        weights[source][rows] /= scales[:, None]
        module = layer.get_submodule(source)
        if module.bias is not None:
            module.bias[rows] /= scales
        if source in low_rank:
            low_rank[source].adapter[rows] /= scales[:, None]


def on_device(branch: LowRank, weight: torch.Tensor) -> LowRank:
    """Copies beside the weight; sums over groups become the matrix that scales need."""
    adapter, projection = branch.adapter.clone().to(weight), branch.projection
    if projection is None:
        shape = (adapter.shape[1], weight.shape[1])
        projection = initial_projection(WeightShard(shape), shape[1] // shape[0])
    return LowRank(adapter, projection.to(weight))


def sizes(stored: StoredRun, tensors: dict, rest: dict) -> dict[str, int]:
    """Bytes by kind, and what the dense model takes."""
    parameters = sum(weight.numel() for weight in stored.weights.values())
    found = {"dense FP32": 4 * parameters, "dense FP16": 2 * parameters}
    for part in PARTS:
        found[part] = sum(
            t.numel() * t.element_size() for n, t in tensors.items() if n.endswith(f".{part}")
        )
    found["rest in FP16"] = sum(2 * t.numel() for t in rest.values())
    found["total"] = sum(found[part] for part in PARTS) + found["rest in FP16"]
    quantized = sum(math.prod(stored.weights[n].shape) for n in stored.weights if n not in rest)
    found["linears FP32"] = 4 * quantized
    found["linears"] = found["total"] - found["rest in FP16"]
    return found


def write(output: Path, tensors: dict[str, torch.Tensor], report: dict) -> None:
    """Both files, in a folder that appears whole or not at all."""
    with new_folder(output, StorageError) as folder:
        save_file(tensors, folder / WEIGHTS)
        write_json(folder / DESCRIPTION, report, indent=1)


def read_quantized(folder: Path) -> dict[str, torch.Tensor]:
    """Dense float32 weights by parameter name, low-rank branches folded in."""
    stored = load_file(folder / WEIGHTS)
    shapes = json.loads((folder / DESCRIPTION).read_text())["shapes"]
    weights = {}
    for name, (_, columns) in shapes.items():
        prefix = name.removesuffix("weight")
        parts = {part: stored.pop(prefix + part) for part in PARTS if prefix + part in stored}
        weight = Quantized.unpack(parts, columns).dequantize()
        if "slorb_adapter" in parts:
            branch = LowRank(parts["slorb_adapter"].float(), parts["slorb_projection"].float())
            weight = branch.fold_into(weight)
        weights[name] = weight
    return {**weights, **{name: tensor.float() for name, tensor in stored.items()}}


def table(report: dict) -> str:
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
