"""2:4 GEMMs on sparse tensor cores: 16-bit, by cuSPARSELt on operands packed here.

    output       z_TN  = x_TK @ W~^T          W~ packed along K, once a step
    grad_input   dx_TK = dz_TN @ W~           W~^T packed along N, once a step, if transposable;
                                              else a dense GEMM with the pruned weight
    grad_weight  dw_NK = MVUE(dz_TN^T) @ x_TK packed along tokens, every micro-batch

Where a dense GEMM is faster for a shape, output and grad_input are computed by it, on the same
pruned weight. The weight gradient stays with MVUE, whose draws are part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Set

import torch

from megasparse.kernels import matmul24, mvue_pack24, spmm24
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.spmm24.agreement import packing_disagreement
from megasparse.sparsity.gemms.choice import GemmChooser, shared_chooser
from megasparse.sparsity.gemms.protocol import Gradient, Kept, PlainOperands
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import Section

DTYPES = (torch.bfloat16, torch.float16)
ALIGNMENT = 64  # rows and columns of a packed 16-bit operand


def refusal(
    weight: torch.Tensor, recipe: SparsityRecipe, channels: tuple[Section, ...]
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
    if torch.cuda.get_device_capability(weight.device)[0] != 9:
        return "the packed layout is Hopper's (compute capability 9)"
    return packing_disagreement(weight.device, weight.dtype)


class PackedSparseGemms(PlainOperands):
    """The GEMMs of one step with W~ packed.

    Args:
        packed: W~ `(N, K)`, 16-bit, 2:4 along K.
        packed_t: W~^T `(K, N)`, 2:4 along N; None if it is not.
        effective: gives W~ when a dense GEMM needs it, so that no dense copy is kept.
        recipe: how dZ^T is pruned along tokens.
        channels: where the local output channels lie in the whole layer.
        error_flag: int32 (1,), set on the device if an operand is not 2:4.
        chooser: which GEMM computes which shape; default: the GPU's own, kept on disk.
        probe: is told what MVUE draws.
    """

    def __init__(
        self,
        packed: Packed24,
        packed_t: Packed24 | None,
        effective: Callable[[], torch.Tensor],
        recipe: SparsityRecipe,
        channels: tuple[Section, ...],
        error_flag: torch.Tensor,
        chooser: GemmChooser | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.halved: Set[str] = frozenset()
        self._probe = probe or Probe()
        self._effective, self._recipe, self._error_flag = effective, recipe, error_flag
        self._channels = tuple((s.local_start, s.global_start, s.length) for s in channels)
        self._packed, self._packed_t = packed, packed_t
        self._chooser = chooser or shared_chooser(packed.values.device)

    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self._multiply("output", self._packed, x_TK, lambda w_NK: w_NK.t())

    def grad_input(self, gradient: Gradient) -> torch.Tensor:
        if self._packed_t is None:
            return gradient.dz_TN @ self._effective()
        return self._multiply("grad_input", self._packed_t, gradient.dz_TN, lambda w_NK: w_NK)

    def grad_weight(self, gradient: Gradient, kept: Kept) -> torch.Tensor:
        (dz_TN, seed), (x_TK,) = gradient, kept
        if self._recipe.mvue == "off":
            return dz_TN.t() @ x_TK
        with self._probe.timer.span("preparation"):
            packed = mvue_pack24(
                dz_TN,
                seed=seed,
                channels=self._channels,
                exact=self._recipe.mvue == "exact",
                error_flag=self._error_flag,
            )
        self._probe.mvue(dz_TN, packed.values)
        self.halved |= {"grad_weight"}
        missing = packed.shape[1] - x_TK.shape[0]  # tokens of zeros add nothing
        if missing:
            x_TK = torch.nn.functional.pad(x_TK, (0, 0, 0, missing))
        (n, t), k = packed.shape, x_TK.shape[1]
        choice = self._chooser.choose(
            f"grad_weight N {n}, K {k}, T {t}, {x_TK.dtype}",
            2 * n * k * t,
            lambda algorithm: matmul24(packed, x_TK, algorithm=algorithm),
            lambda: packed.dense() @ x_TK,
        )
        return matmul24(packed, x_TK, algorithm=choice.algorithm)

    def _multiply(
        self,
        name: str,
        packed: Packed24,
        a: torch.Tensor,
        dense_operand: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """`a (T, K) @ W^T` of the packed W, or by the dense GEMM where that is faster."""
        (n, k), tokens = packed.shape, a.shape[0]
        choice = self._chooser.choose(
            f"T {tokens}, N {n}, K {k}, {a.dtype}",
            2 * n * k * tokens,
            lambda algorithm: spmm24(packed, a, algorithm=algorithm),
            lambda: a @ dense_operand(self._effective()),
        )
        if choice.dense_wins:
            return a @ dense_operand(self._effective())
        self.halved |= {name}
        return spmm24(packed, a, algorithm=choice.algorithm)
