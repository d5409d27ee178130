"""`pack_`: run the 2:4 linears of a finished model on sparse tensor cores, in 16 bits or FP8.

A weight that is read costs less where half of it is packed away: decoding reads weights and little
else, and long prompts are bound by the GEMMs. Which path is faster depends on the shape, so each is
measured on the GPU at hand at its first use, against the dense GEMM in the model's own precision
and with all that surrounds the product; the dense weight stays for the shapes where it wins. A
packed product keeps the host longer, and `generate` waits for the host when tokens are few: it has
to save more time of the device than it takes of the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn.functional import linear as dense_linear

from megasparse.errors import ConfigError
from megasparse.fp8.scale import Scale
from megasparse.kernels import is_24, pack24, scales_of_amax, spmm24
from megasparse.kernels.float8 import quantize
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, E4M3, ROW_MULTIPLE, Packed24
from megasparse.kernels.spmm24.agreement import packing_disagreement
from megasparse.sparsity.gemms.choice import Choice, GemmChooser, shared_chooser
from megasparse.sparsity.gemms.fp8_products import scaled_mm, undone
from megasparse.sparsity.recipe import SparsityRecipe

DTYPES = (torch.bfloat16, torch.float16)
_REPEATS = 9
_HEAD_START = 20_000_000  # cycles, about 10 ms
# Numbers of tokens up to this are measured one by one, larger ones by powers of two.
_EACH = 16


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


class _Operands(Protocol):
    packed: Packed24

    def product(self, x_TK: torch.Tensor, bias: torch.Tensor | None) -> Callable[[int], object]:
        """What computes `x W^T + bias` by an algorithm of the library, of an x that is ready."""
        ...

    def whole(self, x_TK: torch.Tensor, bias: torch.Tensor | None, algorithm: int) -> torch.Tensor:
        """`x W^T + bias`, with all that x needs before."""
        ...

    def expected(self, x_TK: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None) -> object:
        """A function that gives the same product by a dense GEMM, on the same operands."""
        ...


class _SixteenBit:
    """W packed in its own precision."""

    def __init__(self, w_NK: torch.Tensor) -> None:
        self.packed = pack24(w_NK)

    def whole(self, x_TK: torch.Tensor, bias: torch.Tensor | None, algorithm: int) -> torch.Tensor:
        return spmm24(self.packed, x_TK, algorithm=algorithm, bias=bias)

    def product(
        self, x_TK: torch.Tensor, bias: torch.Tensor | None
    ) -> Callable[[int], torch.Tensor]:
        return lambda algorithm: self.whole(x_TK, bias, algorithm)

    def expected(
        self, x_TK: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None
    ) -> Callable[[], torch.Tensor]:
        return lambda: dense_linear(x_TK, w_NK, bias)


class _EightBit:
    """W packed in e4m3 with one scale; x is scaled by its own largest magnitude."""

    def __init__(self, w_NK: torch.Tensor) -> None:
        self._weight = _scale_of(w_NK)._replace(exact=True)
        self._weight = self._weight._replace(assumed=float(self._weight.scale_inv))
        self.packed = pack24(w_NK, E4M3, self._weight.scale_inv)

    def whole(self, x_TK: torch.Tensor, bias: torch.Tensor | None, algorithm: int) -> torch.Tensor:
        return self.product(x_TK, bias)(algorithm)

    def product(
        self, x_TK: torch.Tensor, bias: torch.Tensor | None
    ) -> Callable[[int], torch.Tensor]:
        scale = _scale_of(x_TK)
        rows = quantize(x_TK, scale.scale, E4M3)

        def multiply(algorithm: int) -> torch.Tensor:
            return undone(
                lambda alpha, **added: spmm24(
                    self.packed,
                    rows,
                    out_dtype=x_TK.dtype,
                    algorithm=algorithm,
                    alpha=alpha,
                    **added,
                ),
                scale,
                self._weight,
                bias,
            )

        return multiply

    def expected(
        self, x_TK: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None
    ) -> Callable[[], torch.Tensor]:
        scale = _scale_of(x_TK)
        rows, stored = quantize(x_TK, scale.scale, E4M3), self.packed.stored()
        return lambda: scaled_mm(rows, stored, scale, self._weight, bias)


class Choices:
    """Which path computes which shape, for all linears of a model.

    Args:
        chooser: of cuSPARSELt's algorithms; None (on a CPU): the packed path, unmeasured.
    """

    def __init__(self, chooser: GemmChooser | None) -> None:
        self._chooser = chooser
        self._known: dict[str, int | None] = {}

    def algorithm(
        self, operands: _Operands, x_TK: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None
    ) -> int | None:
        """The library's algorithm for a product; None: the dense GEMM is faster."""
        if self._chooser is None:
            return 0
        packed, tokens = operands.packed, _bucket(x_TK.shape[0])
        key = f"inference T {tokens}, N {packed.shape[0]}, K {packed.shape[1]}, {packed.dtype}"
        key += "" if bias is None else ", bias"
        if key not in self._known:
            self._known[key] = self._measure(key, operands, x_TK, w_NK, bias)
        return self._known[key]

    def _measure(
        self,
        key: str,
        operands: _Operands,
        x_TK: torch.Tensor,
        w_NK: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> int | None:
        assert self._chooser is not None
        product, expected = operands.product(x_TK, bias), operands.expected(x_TK, w_NK, bias)
        flops = 2 * x_TK.shape[0] * w_NK.numel()
        choice: Choice = self._chooser.choose(key, flops, product, expected, least=0)  # type: ignore[arg-type]
        if choice.sparse_ms == float("inf"):
            return None
        best = choice.algorithm
        packed = milliseconds(lambda: operands.whole(x_TK, bias, best))
        dense = milliseconds(lambda: dense_linear(x_TK, w_NK, bias))
        return best if packed < dense else None


def milliseconds(run: Callable[[], object]) -> float:
    """Time of a call: the device's and, in addition, the host's."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)  # the device waits, so that its time holds none of the host's
    begin.record()
    start = time.perf_counter()
    for _ in range(_REPEATS):
        run()
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    return (begin.elapsed_time(end) + 1000 * host) / _REPEATS


class PackedLinear(torch.nn.Linear):
    """A linear of a model that `pack_` was called on; its parameters stay as they are."""

    @staticmethod
    def become(module: torch.nn.Linear, operands: _Operands, choices: Choices) -> None:
        """Turn a linear into one, in place."""
        module.__class__ = PackedLinear
        module.__dict__["_operands"], module.__dict__["_choices"] = operands, choices
        module.__dict__["_chosen"] = {}  # by the number of tokens

    @torch.compiler.disable(reason="megasparse chooses among GEMMs by the number of tokens")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T + b`, `(..., K)` -> `(..., N)`, without gradients."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            raise RuntimeError("packed linears have no gradients: use torch.no_grad()")
        x_TK = x.reshape(-1, x.shape[-1])
        if x_TK.shape[0] == 0:
            return dense_linear(x, self.weight, self.bias)
        operands, bias, known = self.__dict__["_operands"], self.bias, self.__dict__["_chosen"]
        if x_TK.shape[0] not in known:
            choices = self.__dict__["_choices"]
            known[x_TK.shape[0]] = choices.algorithm(operands, x_TK, self.weight, bias)
        chosen = known[x_TK.shape[0]]
        if chosen is None:
            return dense_linear(x, self.weight, bias)
        return operands.whole(x_TK, bias, chosen).view(*x.shape[:-1], -1)


@torch.no_grad()
def pack_(model: torch.nn.Module, fp8: bool = False, layers: Sequence[str] = ("*",)) -> PackReport:
    """Pack the linears of a model whose weights are 2:4, in place, for inference.

    `generate` of transformers and plain forward passes use the packed weights where they are
    faster. On a CPU the definition computes all of them: slow, for tests.

    Args:
        model: in bfloat16 or float16, on its device: an exported model, or one after `finalize()`.
        fp8: operands in e4m3, scaled by a factor a tensor; else in the model's own 16 bits.
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
    choices = Choices(shared_chooser(device) if device.type == "cuda" else None)
    for name, module in chosen.items():
        operands = (_EightBit if fp8 else _SixteenBit)(module.weight.detach())
        PackedLinear.become(module, operands, choices)
        report.packed.append(name)
        report.bytes_added += operands.packed.buffer.numel()
    return report


def unpack_(model: torch.nn.Module) -> int:
    """Make plain linears of all packed ones; their number."""
    found = [module for module in model.modules() if type(module) is PackedLinear]
    for module in found:
        for name in ("_operands", "_choices", "_chosen"):
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


def _scale_of(x: torch.Tensor) -> Scale:
    """The power of two that brings a tensor's largest magnitude into e4m3."""
    scales = scales_of_amax(x.abs().amax().float().reshape(1), power_of_two=True)
    return Scale(scales.scale, scales.scale_inv)


def _bucket(tokens: int) -> int:
    """Numbers of tokens that share a choice."""
    return tokens if tokens <= _EACH else 1 << (tokens - 1).bit_length()
