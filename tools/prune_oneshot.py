"""Prune a trained dense model to 2:4 without training: magnitude, Wanda or SparseGPT.

    python tools/prune_oneshot.py --load runs/dense/checkpoints --output runs/wanda --method wanda

Reads the newest checkpoint of a run, goes through the layers one after the other with calibration
samples of the run's training data (each layer sees the outputs of the pruned ones before it), and
writes a checkpoint that launch scripts, exports and `--load DIR --finetune` read. On the CPU or one
GPU, in float32. Exit codes are those of launch/pretrain.py.
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

from megasparse.checkpoint.directory import list_steps
from megasparse.cli import guarded
from megasparse.compress.oneshot import METHODS, prune
from megasparse.errors import ConfigError
from megasparse.inference.offline import OfflineModel, StoredRun, save_pruned
from megasparse.sparsity.recipe import make_recipe

BLOCK_LINEARS = ("*.self_attention.linear_*", "*.mlp.linear_*")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return guarded("prune_oneshot.py", lambda: print(json.dumps(run(args), indent=1)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, required=True, help="checkpoints of a dense run")
    parser.add_argument("--output", type=Path, required=True, help="new folder of checkpoints")
    parser.add_argument("--method", choices=METHODS, default="wanda")
    parser.add_argument("--sparse-layers", nargs="+", default=list(BLOCK_LINEARS))
    parser.add_argument("--calibration-samples", type=int, default=128, help="sequences")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="sequences at once")
    parser.add_argument("--damping", type=float, default=0.01, help="SparseGPT's")
    parser.add_argument("--data-path", nargs="+", help="calibration data; default the run's")
    parser.add_argument("--eval-iters", type=int, default=0, help="micro-batches of validation")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Prune and write; what was done, and the validation loss before and after if asked for."""
    if list_steps(args.output):
        raise ConfigError(f"output: {args.output} already holds checkpoints")
    stored = StoredRun(args.load)
    if stored.sparse:
        raise ConfigError(f"load: {stored.reader.folder} is 2:4 already, expected a dense model")
    model = OfflineModel(stored, args.data_path, args.micro_batch_size)
    model.put(stored.folded())
    report: dict[str, object] = {"method": args.method, "source": str(stored.reader.folder)}
    if args.eval_iters:
        report["loss_before"] = model.loss(args.eval_iters)
    masks = prune_model(model, args)
    if not masks:
        raise ConfigError(f"sparse_layers: no linear is named like {args.sparse_layers}")
    if args.eval_iters:
        report["loss_after"] = loss = model.loss(args.eval_iters)
        report["perplexity_after"] = math.exp(loss)
    report["pruned"] = len(masks)
    settings = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, list))}
    save_pruned(stored, args.output, model.take(), masks, settings)
    return report


def prune_model(model: OfflineModel, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Prune in place; the masks by parameter name, on the CPU."""
    masks: dict[str, torch.Tensor] = {}
    recipe = make_recipe("ste", sparse_layers=tuple(args.sparse_layers))

    def change(layer_name, layer, inputs):
        for name, seen in inputs.items():
            full = f"{layer_name}.{name}"
            if not recipe.matches(full):
                continue
            weight = layer.get_submodule(name).weight
            gram = seen.square if seen.gram is None else seen.gram
            pruned, mask = prune(weight, args.method, gram, args.damping)
            weight.copy_(pruned)
            masks[f"{full}.weight"] = mask.cpu()

    count = max(1, -(-args.calibration_samples // args.micro_batch_size))
    count = 1 if args.method == "magnitude" else count
    model.calibrate(count, change, gram=args.method == "sparsegpt")
    return masks


if __name__ == "__main__":
    sys.exit(main())
