"""A whole model quantized, layer after layer, and read back from the folder that it is written to.

A folder holds `model.safetensors` and `quantization.json`. What is 2:4 is packed; its zeros stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import new_folder, synced, write_json
from megasparse.compress.folding import ORDER, norm_before, rows_before
from megasparse.compress.quantize import Quantized, awq_scales, quantize
from megasparse.errors import StorageError
from megasparse.inference.offline import LowRank, StoredRun
from megasparse.input_files import open_regular, read_regular
from megasparse.kernels import prune24_mask
from megasparse.megatron.calibrate import LinearInputs
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.slorb import initial_projection
from megasparse.tensor_files import Entry, safe_open, write_tensors

WEIGHTS, DESCRIPTION = "model.safetensors", "quantization.json"
# What a quantized linear `NAME` is stored as: NAME.values, NAME.scales, ...
PARTS = ("values", "scales", "places", "slorb_adapter", "slorb_projection")


class ModelQuantizer:
    """Quantizes the linears of a stored run, layer after layer.

    Args:
        stored: gives the weights `(N, K)`, which of them are 2:4, and low-rank branches.
        kind: "int4" or "fp8".
        group_size: inputs that share a scale in int4.
        awq: scale the inputs by their activations first (int4 alone).

    Attributes:
        tensors: what is stored, by name, on the CPU.
        shapes: of the quantized weights, by parameter name.
        alphas: AWQ's exponent by linear, where one was chosen.
    """

    def __init__(self, stored: StoredRun, kind: str, group_size: int, awq: bool) -> None:
        self._stored, self._kind, self._group_size = stored, kind, group_size
        self.scaled = awq and kind == "int4"
        self.tensors: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.alphas: dict[str, float] = {}

    def layer(
        self, layer_name: str, layer: torch.nn.Module, inputs: dict[str, LinearInputs]
    ) -> None:
        """Scale, fold and quantize one layer; the module gets the dequantized weights.

        Args:
            inputs: what the layer's linears have seen, by the name within the layer.
        """
        device = next(layer.parameters()).device
        weights: dict[str, torch.Tensor] = {}
        low_rank: dict[str, LowRank] = {}
        masks: dict[str, torch.Tensor] = {}
        for name in inputs:
            full = f"{layer_name}.{name}.weight"
            weights[name] = self._stored.weights[full].to(device)
            if full in self._stored.low_rank:
                low_rank[name] = _beside(self._stored.low_rank[full], weights[name])
            if full in self._stored.sparse:
                masks[name] = prune24_mask(weights[name])
        if self.scaled:
            for name in (n for n in ORDER if n in inputs):
                self._scale(name, layer_name, layer, inputs[name], weights, low_rank)
        for name, weight in weights.items():
            codes = quantize(weight, self._kind, self._group_size, masks.get(name))
            result = self._keep(f"{layer_name}.{name}", codes, low_rank.get(name))
            self.shapes[f"{layer_name}.{name}.weight"] = weight.shape
            layer.get_parameter(f"{name}.weight").copy_(result)

    def _keep(self, full: str, codes: Quantized, branch: LowRank | None) -> torch.Tensor:
        """Store a linear's parts; the dense weight that they stand for."""
        parts, result = codes.pack(), codes.dequantize()
        if branch is not None:
            assert branch.projection is not None
            parts["slorb_adapter"] = branch.adapter.half()
            parts["slorb_projection"] = branch.projection.half()
            stored = LowRank(parts["slorb_adapter"].float(), parts["slorb_projection"].float())
            result = stored.fold_into(result)
        for part, tensor in parts.items():
            self.tensors[f"{full}.{part}"] = tensor.cpu().contiguous()
        return result

    def _scale(
        self,
        name: str,
        layer_name: str,
        layer: torch.nn.Module,
        seen: LinearInputs,
        weights: dict[str, torch.Tensor],
        low_rank: dict[str, LowRank],
    ) -> None:
        """Multiply a linear's inputs by AWQ's scales, and divide what comes before it by them."""
        before = rows_before(name, self._stored.model)
        norm = norm_before(name, self._stored.model)
        if before is None and norm is None:
            return
        assert seen.gram is not None
        scales, alpha = awq_scales(weights[name], seen.gram, seen.mean_abs, self._group_size)
        self.alphas[f"{layer_name}.{name}"] = alpha
        weights[name] = weights[name] * scales
        if name in low_rank:
            branch = low_rank[name]
            assert branch.projection is not None
            low_rank[name] = LowRank(branch.adapter, branch.projection * scales)
        if norm is not None:
            for parameter in layer.get_submodule(norm).parameters():
                parameter.div_(scales)
            return
        assert before is not None
        source, rows = before
        rows = rows.to(scales.device)
        weights[source][rows] /= scales[:, None]
        biases = dict(layer.get_submodule(source).named_parameters(recurse=False))
        if "bias" in biases:
            biases["bias"][rows] /= scales
        if source in low_rank:
            low_rank[source].adapter[rows] /= scales[:, None]


def _beside(branch: LowRank, weight: torch.Tensor) -> LowRank:
    """Copies beside the weight; sums over groups become the matrix that scales need."""
    adapter, projection = branch.adapter.clone().to(weight), branch.projection
    if projection is None:
        shape = (adapter.shape[1], weight.shape[1])
        projection = initial_projection(WeightShard(shape), shape[1] // shape[0])
    return LowRank(adapter, projection.to(weight))


def sizes(
    stored: StoredRun, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """Bytes by kind, and what the dense model takes.

    Args:
        tensors: the quantizer's.
        rest: the weights that are not quantized.
    """
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


def write_quantized(
    output: Path, tensors: Mapping[str, torch.Tensor], report: dict[str, Any]
) -> None:
    """Both files, in a folder that appears whole or not at all.

    Args:
        output: a folder that does not exist yet.
        report: of `quantization.json`; its "shapes" are those of the quantized weights.

    Raises:
        StorageError: the folder cannot be written.
    """
    with new_folder(output, StorageError) as folder:
        entries = [Entry.of(name, tensor) for name, tensor in tensors.items()]
        with synced(folder / WEIGHTS) as stream:
            write_tensors(stream, entries, tensors.__getitem__, {})
        write_json(folder / DESCRIPTION, report, indent=1)


def read_quantized(folder: Path) -> dict[str, torch.Tensor]:
    """Dense float32 weights by parameter name, low-rank branches folded in."""
    path = folder / WEIGHTS
    with open_regular(path), safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shapes = json.loads(read_regular(folder / DESCRIPTION))["shapes"]
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
