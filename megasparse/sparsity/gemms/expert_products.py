"""Products of all experts: each one's own on sparse tensor cores, and dense ones of 8 bits.

Which GEMM computes a layer's experts is measured for all of them together, once for a range of
tokens (`ExpertChoices`): sparse products one after the other or on several streams, or dense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megasparse.fp8.scale import Scale
from megasparse.kernels import matmul24_experts, spmm24_experts
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.log import log_once, warn_once
from megasparse.sparsity.gemms.choice import Choice, GemmChooser, milliseconds
from megasparse.sparsity.gemms.experts import ends_of
from megasparse.sparsity.gemms.fp8_products import scaled_mm

Streams = Sequence[torch.cuda.Stream]
SIDE_STREAMS = 4  # of a GPU: more hardly overlap


@functools.cache
def side_streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """Of a GPU, for products of experts side by side."""
    return tuple(torch.cuda.Stream(device) for _ in range(SIDE_STREAMS))


@dataclass(frozen=True)
class ExpertChoice:
    """What computes the experts: 2:4 by an algorithm, on side streams if given; or dense."""

    algorithm: int
    dense_wins: bool = False
    streams: Streams = ()


class ExpertChoices:
    """Which GEMM computes the experts of a layer: the choices of one linear.

    Args:
        experts: E of this rank.
        kind: of the operands, a part of the key.
    """

    def __init__(self, experts: int, kind: str) -> None:
        self._experts, self._kind = experts, kind
        self._known: dict[tuple[str, int], ExpertChoice] = {}

    def choose(
        self,
        chooser: GemmChooser | None,
        name: str,
        shape: tuple[int, int],
        rows: int,
        sparse: Callable[[int, Streams], torch.Tensor],
        dense: Callable[[], torch.Tensor],
    ) -> ExpertChoice:
        """Of a range of rows: up to the next eighth of a power of 2.

        Args:
            chooser: None: nothing is measured.
            shape: `(N, K)` of an expert.
            rows: of all experts.
            sparse: the products by an algorithm of the library, on streams.
            dense: see `GemmChooser.choose`.
        """
        step = max(1 << max(rows.bit_length() - 4, 0), 64)
        rounded = -(-rows // step) * step
        known = self._known.get((name, rounded))
        if known is None:
            known = ExpertChoice(0)
            if chooser is not None:
                n, k = shape
                key = f"{self._experts} experts, {name} T {rounded}, N {n}, K {k}, {self._kind}"
                one = chooser.choose(key, 2 * n * k * rows, lambda a: sparse(a, ()), dense)
                known = self._side_by_side(key, one, sparse)
            self._known[name, rounded] = known
        return known

    def _side_by_side(
        self, key: str, one: Choice, sparse: Callable[[int, Streams], torch.Tensor]
    ) -> ExpertChoice:
        """The products on streams, where that was measured to be faster."""
        alone = ExpertChoice(one.algorithm, one.dense_wins)
        if self._experts == 1 or not 0.0 < one.sparse_ms < float("inf"):
            return alone
        streams = side_streams(torch.device("cuda", torch.cuda.current_device()))
        together = milliseconds(lambda: sparse(one.algorithm, streams), 9)
        if together >= one.sparse_ms:
            return alone
        log_once("%s: 2:4 on %d streams %.3f ms", key, len(streams), together)
        return ExpertChoice(one.algorithm, one.dense_ms < together, streams)


def each_product(
    packed: Sequence[Packed24],
    a: torch.Tensor,
    counts: Sequence[int],
    algorithm: int,
    streams: Streams = (),
    alpha: float | None = None,
) -> torch.Tensor:
    """`a_e @ W_e^T` of every expert, `(T', N)`; of 8 bits bfloat16.

    Args:
        packed: W of each expert.
        a: `(T', K)`, sorted by expert.
        counts: rows of each, in whole tiles.
        streams: for products side by side; none: one after the other.
        alpha: factor in place of the packed scale; 16 bits have none.
    """
    alpha = 1.0 if alpha is None and packed[0].dtype.itemsize == 2 else alpha
    return spmm24_experts(packed, a, counts, algorithm=algorithm, alpha=alpha, streams=streams)


def each_sum(
    packed: Sequence[Packed24],
    b: torch.Tensor | Sequence[torch.Tensor],
    counts: Sequence[int],
    algorithm: int,
    streams: Streams = (),
    transposed: bool = False,
    alpha: float | None = None,
) -> torch.Tensor:
    """`A_e @ b_e` of every expert, `(E, N, K)`; zeros for one without rows.

    Args:
        packed: A `(N, T_e)` of each expert.
        b: `(T', K)`, or `(K, T')` if `transposed`, as 8 bits must be; or those of each expert.
        counts: rows of each.
        streams, alpha: as above.
    """
    dim = 1 if transposed else 0
    each = b.split(list(counts), dim) if isinstance(b, torch.Tensor) else b
    alpha = 1.0 if alpha is None and packed[0].dtype.itemsize == 2 else alpha
    return matmul24_experts(
        packed, each, transposed=transposed, algorithm=algorithm, alpha=alpha, streams=streams
    )


def scaled_products(
    a_TC: torch.Tensor,
    b_EDC: torch.Tensor,
    counts: Sequence[int],
    a: Scale,
    b: Scale,
    grouped: bool,
) -> torch.Tensor:
    """`a_e b_e^T` `(T', D)` bfloat16 of 8-bit operands of every expert, their scaling undone.

    Args:
        b_EDC: `(E, D, C)`, C running fastest.
        grouped: one launch on a GPU, where both are e4m3.
    """
    rows, outputs = a_TC.shape[0], b_EDC.shape[1]
    if _in_one_launch(grouped, a_TC):
        return _grouped_products(a_TC, b_EDC, counts, a, b)
    z = torch.empty(rows, outputs, dtype=torch.bfloat16, device=a_TC.device)
    for w, part, out in zip(b_EDC, a_TC.split(list(counts)), z.split(list(counts)), strict=True):
        if len(part):
            scaled_mm(part, w, a, b, out=out)
    return z


def scaled_sums(
    a_NT: torch.Tensor,
    b_KT: torch.Tensor,
    counts: Sequence[int],
    a: Scale,
    b: Scale,
    grouped: bool,
) -> torch.Tensor:
    """`a_e b_e^T` `(E, N, K)` bfloat16, summed over the rows of each expert; zeros without any.

    Args:
        a_NT, b_KT: 8 bits, rows of tokens along dimension 1.
        grouped: as above.
    """
    experts, n, k = len(counts), a_NT.shape[0], b_KT.shape[0]
    if _in_one_launch(grouped, a_NT):
        dw = _grouped_sums(a_NT, b_KT, counts, a, b)
    else:
        dw = torch.empty(experts, n, k, dtype=torch.bfloat16, device=a_NT.device)
        for left, right, out in zip(
            a_NT.split(list(counts), 1), b_KT.split(list(counts), 1), dw, strict=True
        ):
            if left.shape[1]:
                scaled_mm(left, right, a, b, out=out)
    for count, out in zip(counts, dw, strict=True):
        if not count:
            out.zero_()
    return dw


def _in_one_launch(grouped: bool, a: torch.Tensor) -> bool:
    """Whether the library's grouped GEMM computes it."""
    if not (grouped and a.is_cuda and a.dtype == E4M3):
        return False
    reason = _grouped_disagreement(a.device)
    if reason is not None:
        warn_once("FP8 GEMMs of experts are one an expert: %s", reason)
    return reason is None


@functools.cache
def _grouped_disagreement(device: torch.device) -> str | None:
    """Why torch's grouped GEMMs of 8 bits are not used: what they did with small operands, or None.

    They are private functions of torch. Asked once a process.
    """
    generator = torch.Generator(device).manual_seed(24)

    def operand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(E4M3)

    one = torch.ones((), device=device)
    counts, scale = [128, 0, 256], Scale(one, one)
    a, b, w = operand(256, 384), operand(128, 384), operand(3, 128, 256)
    rows, apart = a.view(torch.uint8).t().contiguous().view(E4M3), operand(256, 3 * 128)
    apart = apart.unflatten(1, (3, 128)).transpose(0, 1)  # as grad_input finds the weights
    cases: list[tuple[str, Any, Any, tuple[torch.Tensor, torch.Tensor]]] = [
        ("output", _grouped_products, scaled_products, (rows, w)),
        ("grad_input", _grouped_products, scaled_products, (rows[:, :128].contiguous(), apart)),
        ("grad_weight", _grouped_sums, scaled_sums, (a, b)),
    ]
    for name, grouped, single, operands in cases:
        given = (*operands, counts, scale, scale)
        try:
            found = grouped(*given).float()
        except RuntimeError as error:
            return f"{name}: {error}".partition("\n")[0]
        expected = single(*given, False).float()
        if name == "grad_weight":
            found[1] = 0.0
        if not float((found - expected).norm()) < 1e-2 * float(expected.norm()):
            return f"{name} is wrong"
    return None


def _grouped_products(
    a_TC: torch.Tensor, b_EDC: torch.Tensor, counts: Sequence[int], a: Scale, b: Scale
) -> torch.Tensor:
    """`scaled_products` in one launch, e4m3."""
    product: torch.Tensor = torch._scaled_grouped_mm(
        a_TC,
        b_EDC.transpose(1, 2),
        a.scale_inv.expand(a_TC.shape[0]).contiguous(),
        b.scale_inv.expand(b_EDC.shape[:2]).contiguous(),
        offs=ends_of(counts, a_TC.device),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product


def _grouped_sums(
    a_NT: torch.Tensor, b_KT: torch.Tensor, counts: Sequence[int], a: Scale, b: Scale
) -> torch.Tensor:
    """`scaled_sums` in one launch, e4m3; anything for an expert without rows."""
    product: torch.Tensor = torch._scaled_grouped_mm(
        a_NT,
        b_KT.t(),
        a.scale_inv.expand(len(counts) * a_NT.shape[0]).contiguous(),
        b.scale_inv.expand(len(counts) * b_KT.shape[0]).contiguous(),
        offs=ends_of(counts, a_NT.device),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product
