"""`pack_`: run the 2:4 linears of a finished model on sparse tensor cores, in 16 bits or FP8.

A weight that is read costs less where half of it is packed away: decoding reads weights and little
else, and long prompts are bound by the GEMMs. Which path is faster depends on the shape and on the
model (`packed_choice.py`); the dense weight stays for where it wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import linear as dense_linear

from megasparse.errors import ConfigError
from megasparse.kernels import is_24
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, E4M3, ROW_MULTIPLE
from megasparse.kernels.spmm24.agreement import packing_disagreement
from megasparse.nn.packed_choice import Choices, WholePasses
from megasparse.nn.packed_operands import EightBit, LastInput, Operands, SixteenBit
from megasparse.sparsity.gemms.choice import shared_chooser
from megasparse.sparsity.recipe import SparsityRecipe

DTYPES = (torch.bfloat16, torch.float16)


@dataclass
class PackReport:
    """What `pack_` did.

    Attributes:
        packed: names of the linears that were packed.
        left: names of the others, with the reason.
        bytes_added: memory of the packed operands; the dense weights stay.
    """

    packed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    bytes_added: int = 0


class PackedLinear(torch.nn.Linear):
    """A linear of a model that `pack_` was called on; its parameters stay as they are."""

    @staticmethod
    def become(
        module: torch.nn.Linear, operands: Operands, choices: Choices, passes: WholePasses | None
    ) -> None:
        """Turn a linear into one, in place."""
        module.__class__ = PackedLinear
        module.__dict__["_operands"], module.__dict__["_choices"] = operands, choices
        module.__dict__["_passes"] = passes
        module.__dict__["_chosen"] = {}  # by the number of tokens

    @torch.compiler.disable(reason="megasparse chooses among GEMMs by the number of tokens")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T + b`, `(..., K)` -> `(..., N)`, without gradients."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            raise RuntimeError("packed linears have no gradients: use torch.no_grad()")
        own = self.__dict__
        tokens, passes, known = x.numel() // x.shape[-1], own["_passes"], own["_chosen"]
        if tokens == 0 or not (passes is None or passes.packed(tokens)):
            return dense_linear(x, self.weight, self.bias)
        if tokens not in known:
            known[tokens] = own["_choices"].algorithm(own["_operands"], x, self.weight, self.bias)
        if known[tokens] is None:
            return dense_linear(x, self.weight, self.bias)
        z_TN = own["_operands"].whole(x, self.bias, known[tokens])
        return z_TN.view(*x.shape[:-1], z_TN.shape[1])


@torch.no_grad()
def pack_(model: torch.nn.Module, fp8: bool = False, layers: Sequence[str] = ("*",)) -> PackReport:
    """Pack the linears of a model whose weights are 2:4, in place, for inference.

    `generate` of transformers and plain forward passes use the packed weights where they are
    faster: the first few passes of each number of tokens are timed, packed and dense in turn. On a
    CPU the definition computes all of them: slow, for tests.

    Args:
        model: in bfloat16 or float16, on its device: an exported model, or one after `finalize()`.
        fp8: operands in e4m3, W scaled by one factor and each token of x by its own; else in the
            model's own 16 bits.
        layers: patterns of the names of the linears.

    Returns: what was packed, and why the rest was not.

    Raises:
        ConfigError: no linear can be packed; the message gives the first reason.
    """
    patterns = SparsityRecipe("ste", tuple(layers), projection="row")
    report = PackReport()
    chosen: dict[str, torch.nn.Linear] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not patterns.matches(name):
            continue
        reason = _refusal(module, fp8)
        if reason is None:
            chosen[name] = module
        else:
            report.left[name] = reason
    if not chosen:
        first = next((f"{n}: {why}" for n, why in report.left.items()), "no linear has such a name")
        raise ConfigError(f"pack_: no linear can be packed: {first}")
    device = next(iter(chosen.values())).weight.device
    on_gpu = device.type == "cuda"
    choices = Choices(shared_chooser(device) if on_gpu else None)
    passes = WholePasses(model, choices) if on_gpu else None
    last = LastInput()
    for name, module in chosen.items():
        weight = module.weight.detach()
        operands = EightBit(weight, last) if fp8 else SixteenBit(weight)
        PackedLinear.become(module, operands, choices, passes)
        report.packed.append(name)
        report.bytes_added += operands.packed.buffer.numel()
    return report


def unpack_(model: torch.nn.Module) -> int:
    """Make plain linears of all packed ones; their number."""
    found = [module for module in model.modules() if type(module) is PackedLinear]
    for module in found:
        if module.__dict__["_passes"] is not None:
            module.__dict__["_passes"].remove()
        for name in ("_operands", "_choices", "_passes", "_chosen"):
            del module.__dict__[name]
        module.__class__ = torch.nn.Linear  # type: ignore[assignment]
    return len(found)


def _refusal(module: torch.nn.Linear, fp8: bool) -> str | None:
    """Why a linear cannot be packed."""
    weight = module.weight.detach()
    if type(module) is not torch.nn.Linear:
        return f"is a {type(module).__name__}, expected torch.nn.Linear itself"
    if weight.dtype not in DTYPES:
        return f"is {weight.dtype}, expected bfloat16 or float16"
    dtype = E4M3 if fp8 else weight.dtype
    multiples = (ROW_MULTIPLE, COLUMN_MULTIPLE[dtype])
    if any(size % multiple for size, multiple in zip(weight.shape, multiples, strict=True)):
        return f"has shape {tuple(weight.shape)}, expected multiples of {multiples}"
    if not is_24(weight):
        return "is not 2:4"
    if not weight.is_cuda:
        return None
    if torch.cuda.get_device_capability(weight.device)[0] != 9:
        return "the packed layout is Hopper's (compute capability 9)"
    return packing_disagreement(weight.device, dtype)
