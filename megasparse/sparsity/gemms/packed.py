"""2:4 GEMMs on sparse tensor cores: 16-bit, by cuSPARSELt on operands packed here.

    output       z_TN  = x_TK @ W~^T          W~ packed along K, once a step
    grad_input   dx_TK = dz_TN @ W~           W~^T packed along N, once a step, if transposable or
                                              double-pruned; else a dense GEMM with W~
    grad_weight  dw_NK = MVUE(dz_TN^T) @ x_TK packed along tokens, every micro-batch

Where a dense GEMM is faster for a shape, output and grad_input are computed by it, on the same
pruned weight. The weight gradient stays with MVUE, whose draws are part of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from megasparse.kernels import matmul24, mvue_pack24, spmm24, unpack24, weight_pack24
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.spmm24.agreement import packing_disagreement
from megasparse.kernels.token_order import by_groups
from megasparse.sparsity.gemms.choice import Choice, GemmChooser, shared_chooser
from megasparse.sparsity.gemms.protocol import (
    Deferred,
    GradOutput,
    PlainOperands,
    SavedInput,
    with_bias,
)
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected, effective
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ALL_TOKENS, ShardSlice, TokenShare

DTYPES = (torch.bfloat16, torch.float16)
ALIGNMENT = 64  # rows and columns of a packed 16-bit operand


def refusal(
    weight: torch.Tensor, recipe: SparsityRecipe, channels: tuple[ShardSlice, ...]
) -> str | None:
    """Why the sparse tensor cores cannot compute this layer, or None when they can."""
    if not weight.is_cuda:
        return f"the weight is on {weight.device.type}"
    if weight.dtype not in DTYPES:
        return f"the weight is {weight.dtype}, expected 16 bits"
    if recipe.simulate_fp8:
        return "simulate_fp8 rounds operands that the sparse GEMMs do not take"
    lengths = [*weight.shape, *(section.length for section in channels)]
    if any(length % ALIGNMENT for length in lengths):
        return f"the shard is {tuple(weight.shape)}, expected multiples of {ALIGNMENT}"
    return None


def layout_refusal(weight: torch.Tensor) -> str | None:
    """Why our kernels do not write what this GPU's sparse tensor cores read, or None."""
    if torch.cuda.get_device_capability(weight.device)[0] != 9:
        return "the packed layout is Hopper's (compute capability 9)"
    return packing_disagreement(weight.device, weight.dtype)


class PackedSparseGemms(PlainOperands):
    """The GEMMs of a sparse phase with W~ packed.

    Args:
        recipe: what of W~^T is 2:4, and how dZ^T is pruned along tokens.
        channels: where the local output channels lie in the whole layer.
        probe: is told what MVUE draws.
        chooser: which GEMM computes which shape; default: the GPU's own, kept on disk.
        tokens: which tokens of a micro-batch are here; all by default.
    """

    _packed: Packed24
    _packed_t: Packed24 | None

    def __init__(
        self,
        recipe: SparsityRecipe,
        channels: tuple[ShardSlice, ...],
        probe: Probe | None = None,
        chooser: GemmChooser | None = None,
        tokens: TokenShare = ALL_TOKENS,
    ) -> None:
        self._tokens = tokens
        self.ran_sparse: set[str] = set()
        self._probe, self._recipe, self._chooser = probe or Probe(), recipe, chooser
        self._channels = tuple((s.local_start, s.global_start, s.length) for s in channels)
        self._choices: dict[tuple[str, int], Choice] = {}
        self._operands: tuple[Packed24, Packed24 | None] | None = None

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        assert projected is not None
        self._w_NK, self._projected = w_NK, projected
        packed, packed_t = weight_pack24(
            w_NK,
            projected.mask,
            threshold_scale=projected.beta,
            transposed=self._recipe.packed_transpose,
            error_flag=projected.error_flag,
            nan_flag=projected.nan_flag,
            out=self._operands,
        )
        assert not isinstance(packed_t, torch.Tensor)
        self._packed, self._packed_t = self._operands = packed, packed_t

    def output(self, x_TK: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._multiply("output", self._packed, x_TK, lambda: self._effective().t(), bias)

    def grad_input(self, operands: GradOutput, deferred: Deferred | None = None) -> torch.Tensor:
        packed_t = self._packed_t
        if packed_t is None:
            return operands.dz_TN @ self._effective()
        dense = self._effective
        if self._recipe.double_pruned:
            dense = lambda: unpack24(packed_t).t()  # noqa: E731
        return self._multiply("grad_input", packed_t, operands.dz_TN, dense)

    def grad_weight(self, operands: GradOutput, saved: SavedInput) -> torch.Tensor:
        (dz_TN, seed), (x_TK,) = operands, saved
        if self._recipe.mvue == "off":
            return dz_TN.t() @ x_TK
        with self._probe.timer.span("preparation"):
            packed = mvue_pack24(
                dz_TN,
                seed=seed,
                channels=self._channels,
                tokens=self._tokens.places(dz_TN.shape[0]),
                exact=self._recipe.mvue == "exact",
                strided=self._recipe.strided_groups,
                error_flag=self._projected.error_flag,
            )
        missing = packed.shape[1] - x_TK.shape[0]  # tokens of zeros add nothing
        if missing:
            x_TK, dz_TN = (pad(t, (0, 0, 0, missing)) for t in (x_TK, dz_TN))
        if self._recipe.strided_groups:
            x_TK = by_groups(x_TK)  # one copy: the library takes rows at one distance alone
        self._probe.mvue(dz_TN, packed.values, self._recipe)
        (n, t), k = packed.shape, x_TK.shape[1]
        choice = self._choice(
            "grad_weight",
            t,
            lambda: f"grad_weight N {n}, K {k}, T {t}, {x_TK.dtype}",
            2 * n * k * t,
            lambda algorithm: matmul24(packed, x_TK, algorithm=algorithm),
            lambda: packed.dense() @ x_TK,
        )
        self.ran_sparse.add("grad_weight")
        return matmul24(packed, x_TK, algorithm=choice.algorithm)

    def _multiply(
        self,
        name: str,
        packed: Packed24,
        a: torch.Tensor,
        dense_operand: Callable[[], torch.Tensor],
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`a (T, K) @ W^T + bias` of the packed W, or by the dense GEMM where that is faster."""
        (n, k), tokens = packed.shape, a.shape[0]
        choice = self._choice(
            name,
            tokens,
            lambda: f"T {tokens}, N {n}, K {k}, {a.dtype}",
            2 * n * k * tokens,
            lambda algorithm: spmm24(packed, a, algorithm=algorithm, bias=bias),
            lambda: with_bias(a @ dense_operand(), bias),
        )
        if choice.dense_wins:
            return with_bias(a @ dense_operand(), bias)
        self.ran_sparse.add(name)
        return spmm24(packed, a, algorithm=choice.algorithm, bias=bias)

    def _effective(self) -> torch.Tensor:
        """W~ where a dense GEMM needs it; computed anew, so that no dense copy is kept."""
        return effective(self._w_NK, self._projected)

    def _choice(self, name: str, tokens: int, key: Any, flops: int, *products: Any) -> Choice:
        """Kept here too, as making the chooser's key takes the host's time."""
        known = self._choices.get((name, tokens))
        if known is None:
            chooser = self._chooser or shared_chooser(self._w_NK.device)
            known = self._choices[name, tokens] = chooser.choose(key(), flops, *products)
        return known
