"""What the linears of a model see, collected layer by layer.

The hidden states before the first layer are kept for all batches; then each layer runs on them,
its linears' inputs are added up, the caller changes the layer, and it runs again on the changed
weights to give the next layer's inputs (as in SparseGPT and AWQ).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megasparse.megatron.parallel_linear import ParallelLinear


class LinearInputs:
    """Sums over the inputs `(..., K)` of one linear.

    Attributes:
        gram: `X^T X` `(K, K)` float32, or None if it was not asked for.
        square: sums of squares `(K,)` float32, its diagonal.
        absolute: sums of magnitudes `(K,)` float32.
        tokens: how many.
    """

    def __init__(self, columns: int, device: torch.device, gram: bool) -> None:
        zeros = torch.zeros(columns, device=device)
        self.gram = torch.zeros(columns, columns, device=device) if gram else None
        self.square, self.absolute, self.tokens = zeros, zeros.clone(), 0

    def add(self, x: torch.Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if self.gram is not None:
            self.gram.addmm_(flat.t(), flat)
        self.square += flat.square().sum(0)
        self.absolute += flat.abs().sum(0)
        self.tokens += flat.shape[0]

    @property
    def mean_abs(self) -> torch.Tensor:
        """`mean |x_j|` `(K,)`."""
        return self.absolute / max(self.tokens, 1)


class _Reached(Exception):
    """The first layer has its inputs; the rest of the model is not computed."""


@torch.no_grad()
def calibrate_layers(
    model: GPTModel,
    batches: Iterable[dict[str, torch.Tensor]],
    change: Callable[[str, torch.nn.Module, dict[str, LinearInputs]], None],
    gram: bool,
) -> None:
    """Go through the decoder's layers (see the module); without tensor or pipeline parallelism.

    Args:
        model: in evaluation mode.
        batches: tokens and position_ids `(B, S)`.
        change: given a layer's name, module, and inputs by the linear's name within the layer.
        gram: collect Gram matrices too.
    """
    calls = _first_inputs(model, batches)
    for number, layer in enumerate(model.decoder.layers):
        inputs: dict[str, LinearInputs] = {}
        handles = []
        for name, module in layer.named_modules():
            if isinstance(module, ParallelLinear):
                columns = module.weight.shape[1]
                inputs[name] = LinearInputs(columns, module.weight.device, gram)
                handles.append(module.register_forward_pre_hook(_adder(inputs[name])))
        for call in calls:
            layer(**call)
        for handle in handles:
            handle.remove()
        change(f"decoder.layers.{number}", layer, inputs)
        for call in calls:
            call["hidden_states"] = layer(**call)[0]


def _adder(inputs: LinearInputs) -> Callable[[torch.nn.Module, Any], None]:
    def add(_: torch.nn.Module, arguments: Any) -> None:
        inputs.add(arguments[0])

    return add


def _first_inputs(
    model: GPTModel, batches: Iterable[dict[str, torch.Tensor]]
) -> list[dict[str, Any]]:
    """Keyword arguments of the first layer for every batch."""
    calls: list[dict[str, Any]] = []

    def catch(_: torch.nn.Module, __: Any, keywords: dict[str, Any]) -> None:
        calls.append(dict(keywords))
        raise _Reached

    handle = model.decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"))
            except _Reached:
                continue
    finally:
        handle.remove()
    return calls
