"""What `tools.bench.kernels` measures: one `Case` a row, with its inputs and what else exists.

Operations are named, not imported: one that `megasparse.kernels` does not have is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megasparse import kernels

LARGE, WEIGHT = (16384, 14336), (14336, 4096)
BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
SHORT = {BF16: "bf16", FP32: "fp32", E4M3: "e4m3"}
ONE_BF16_STEP = 2.0**-7

Inputs = tuple[Any, ...]
Step = Callable[[], Any]  # what is timed: a call with everything prepared


@dataclass(frozen=True)
class Source:
    """Random inputs of one shape on one device."""

    shape: tuple[int, int]
    device: torch.device
    generator: torch.Generator

    def normal(self, dtype: torch.dtype = BF16, column_major: bool = False) -> torch.Tensor:
        shape = self.shape[::-1] if column_major else self.shape
        x = torch.randn(shape, dtype=FP32, device=self.device, generator=self.generator)
        x = x.to(dtype)
        return x.t() if column_major else x

    def mask(self) -> torch.Tensor:
        uniform = torch.rand(self.shape, device=self.device, generator=self.generator)
        return uniform < 0.5

    def transposable(self) -> torch.Tensor:
        """A transposable mask, the same in every 4x4 block: which one costs a kernel the same."""
        rows, columns = self.shape
        pattern = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
        return pattern.bool().repeat(rows // 4, columns // 4).to(self.device)

    def number(self, x: float) -> torch.Tensor:
        return torch.tensor(x, device=self.device)

    def maxima(self, count: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(1, device=self.device) for _ in range(count))

    def sparse(self, dtype: torch.dtype = BF16) -> torch.Tensor:
        w = self.normal(dtype)
        return w * kernels.prune24_mask(w, backend="reference")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    op: str  # name in megasparse.kernels
    bytes_per_entry: float
    inputs: Callable[[Source], Inputs]
    prepare: Callable[[Callable[..., Any], Inputs], Step] = lambda op, inputs: partial(op, *inputs)
    others: Mapping[str, Callable[[Inputs], Step]] = field(default_factory=dict)
    shape: tuple[int, int] = LARGE
    odd_shape: tuple[int, int] = (516, 1036)
    rtol: float = 0.0  # 0: the same bits
    atol: float = 0.0
    wrong_share: float = 0.0  # of a result's bytes that may differ


def torch_prune24(w: torch.Tensor) -> torch.Tensor:
    """The mask of the two largest of four along K, by torch's topk."""
    top = w.abs().view(-1, 4).topk(2, dim=1).indices
    return torch.zeros_like(w, dtype=torch.bool).view(-1, 4).scatter_(1, top, True)


def torch_transposable24(w: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """The papers' convolution with 90 kernels, as a matrix product."""
    rows, cols = w.shape
    blocks = w.abs().view(rows // 4, 4, cols // 4, 4).transpose(1, 2).reshape(-1, 16)
    best = (blocks @ patterns.view(90, 16).t().to(w.dtype)).argmax(1)
    mask = patterns[best].view(rows // 4, cols // 4, 4, 4)
    return mask.transpose(1, 2).reshape(rows, cols)


def torch_soft_threshold24(w: torch.Tensor) -> torch.Tensor:
    """The S-STE projection before scaling, by a sort: groups of four `(N K / 4, 4)`."""
    groups = w.view(-1, 4)
    threshold = groups.abs().sort(dim=1).values[:, 1:2]
    return torch.sign(groups) * F.relu(groups.abs() - threshold)


def torch_scale(w: torch.Tensor) -> torch.Tensor:
    """S-STE's scale, 0-d float32."""
    s = torch_soft_threshold24(w).view_as(w).float()
    return (w.float() * s).sum() / (s * s).sum()


def backward_of(op: Callable[..., Any], inputs: Inputs) -> Step:
    """A step that runs the backward pass alone: inputs are (x, gate, grad)."""
    x, gate, grad = inputs
    x, gate = x.detach().requires_grad_(), gate.detach().requires_grad_()
    out = op(x, gate)
    return lambda: torch.autograd.grad(out, (x, gate), grad, retain_graph=True)


def mask_cases() -> list[Case]:
    """Masks, projections, and what is computed of them."""
    cases = []
    for dtype, size in ((BF16, 2), (FP32, 4)):
        weight = partial(lambda source, dtype: (source.normal(dtype),), dtype=dtype)
        cases += [
            Case(
                f"prune24_mask {SHORT[dtype]}",
                "prune24_mask",
                size + 1,
                weight,
                others={"torch topk": lambda t: partial(torch_prune24, *t)},
            ),
            Case(
                f"transposable24_mask {SHORT[dtype]}",
                "transposable24_mask",
                size + 1,
                weight,
                shape=WEIGHT,
                others={
                    "90-pattern matmul": lambda t: partial(
                        torch_transposable24, t[0], kernels.transposable_patterns().to(t[0].device)
                    ),
                    "torch._sparse_semi_structured_tile": lambda t: partial(
                        torch._sparse_semi_structured_tile, t[0].to(BF16)
                    ),
                },
            ),
            Case(
                f"soft_threshold24 {SHORT[dtype]}",
                "soft_threshold24",
                2 * size,
                weight,
                others={"torch sort": lambda t: partial(torch_soft_threshold24, *t)},
            ),
            Case(
                f"s_ste_scale {SHORT[dtype]}",
                "s_ste_scale",
                size,
                weight,
                rtol=1e-5,
                others={"torch sort": lambda t: partial(torch_scale, *t)},
            ),
            Case(
                f"soft_threshold24_with_sums {SHORT[dtype]}",
                "soft_threshold24_with_sums",
                2 * size,
                weight,
                rtol=1e-5,
                atol=1e-12,
            ),
        ]
    for grad, w, size in ((FP32, FP32, 13), (FP32, BF16, 11), (BF16, BF16, 7)):
        cases.append(
            Case(
                f"masked_decay_ grad {SHORT[grad]} w {SHORT[w]}",
                "masked_decay_",
                size,
                partial(
                    lambda source, grad, w: (source.normal(grad), source.normal(w), source.mask()),
                    grad=grad,
                    w=w,
                ),
                lambda op, t: partial(op, *t, 1e-4),
                others={"torch add": lambda t: lambda: t[0].add_(~t[2] * t[1], alpha=1e-4)},
            )
        )
    cases.append(
        Case(
            "count_flips",
            "count_flips",
            2,
            lambda source: (source.mask(), source.mask()),
            others={"torch xor, sum": lambda t: lambda: (t[0] ^ t[1]).sum()},
        )
    )
    return cases


def mvue_cases() -> list[Case]:
    """Gradients made 2:4 at random."""
    return [
        Case(
            f"mvue24 {'exact' if exact else 'approx'} dim {dim} bf16",
            "mvue24",
            4,
            lambda source: (source.normal(),),
            partial(
                lambda op, t, dim, exact: partial(op, *t, seed=7, dim=dim, exact=exact),
                dim=dim,
                exact=exact,
            ),
            odd_shape=(515, 1031),
            rtol=ONE_BF16_STEP,
        )
        for exact in (True, False)
        for dim in (0, 1)
    ]


def activation_cases() -> list[Case]:
    """Gated activations, forward and backward."""
    plain = {
        "swiglu": lambda x, gate: F.silu(gate) * x,
        "geglu": lambda x, gate: F.gelu(gate, approximate="tanh") * x,
    }
    cases = []
    for op, column_major in ((op, column) for op in plain for column in (False, True)):
        layout = "column" if column_major else "row"

        def make(source: Source, count: int, column: bool = column_major) -> Inputs:
            return tuple(source.normal(BF16, column) for _ in range(count))

        shared: dict[str, Any] = {"odd_shape": (515, 1031), "rtol": ONE_BF16_STEP, "atol": 1e-3}
        cases += [
            Case(
                f"{op} forward {layout}-major bf16",
                op,
                6,
                partial(make, count=2),
                others={"torch": partial(lambda t, f: partial(f, *t), f=plain[op])},
                **shared,
            ),
            Case(
                f"{op} backward {layout}-major bf16",
                op,
                10,
                partial(make, count=3),
                backward_of,
                others={"torch autograd": partial(lambda t, f: backward_of(f, t), f=plain[op])},
                **shared,
            ),
        ]
    return cases


def pack_cases() -> list[Case]:
    """Packing and unpacking."""
    shared: dict[str, Any] = {"odd_shape": (192, 384)}
    compress = {"torch._cslt_compress": lambda t: partial(torch._cslt_compress, t[0])}

    def e4m3(source: Source) -> Inputs:
        return (source.sparse().to(E4M3),)

    return [
        Case("pack24 bf16", "pack24", 3.125, lambda s: (s.sparse(),), others=compress, **shared),
        Case("pack24 e4m3", "pack24", 1.625, e4m3, others=compress, **shared),
        Case(
            "pack24 bf16 to e4m3, scale given",
            "pack24",
            2.625,
            lambda s: (s.sparse(), torch.tensor(0.01, device=s.device)),
            lambda op, t: partial(op, t[0], dtype=E4M3, scale_inv=t[1]),
            **shared,
        ),
        Case(
            "scale_inv_of bf16", "scale_inv_of", 2, lambda s: (s.normal(),), odd_shape=(515, 1031)
        ),
        Case(
            "rescale_ bf16",
            "rescale_",
            4,
            lambda s: (s.normal(), s.number(3.0), s.number(1 / 3)),
            odd_shape=(515, 1031),
            others={"torch, factor in 16 bits": lambda t: lambda: t[0].mul_(t[1])},
        ),
        Case(  # the weight is read twice
            "pack24 bf16 to e4m3, scale by amax",
            "pack24",
            4.625,
            lambda source: (source.sparse(),),
            lambda op, t: partial(op, *t, dtype=E4M3),
            others={
                "cast, torch._cslt_compress": lambda t: lambda: torch._cslt_compress(t[0].to(E4M3))
            },
            **shared,
        ),
        Case(
            "unpack24 bf16",
            "unpack24",
            3.125,
            lambda source: (kernels.pack24(source.sparse(), backend="reference"),),
            **shared,
        ),
    ]


def single_cases() -> list[Case]:
    """All rows of kernels that do one thing."""
    return [*mask_cases(), *mvue_cases(), *activation_cases(), *pack_cases()]
