"""2:4 GEMMs on sparse tensor cores: 16-bit, by cuSPARSELt on operands packed here.

output       z_TN  = x_TK @ W~^T          W~ packed along K, once a step
grad_input   dx_TK = dz_TN @ W~           W~^T packed along N, once a step, if transposable;
                                          else a dense GEMM with the pruned weight
grad_weight  dw_NK = MVUE(dz_TN^T) @ x_TK packed along tokens, every micro-batch
"""

from __future__ import annotations

import torch

from megasparse.kernels import matmul24, mvue_pack24, pack24, spmm24
from megasparse.sparsity.gemms import ReferenceSparseGemms
from megasparse.sparsity.recipe import Mvue, SparsityRecipe
from megasparse.sparsity.shard import Section

DTYPES = (torch.bfloat16, torch.float16)
ALIGNMENT = 64  # rows and columns of a packed 16-bit operand


def refusal(weight: torch.Tensor, recipe: SparsityRecipe) -> str | None:
    """Why the sparse tensor cores cannot compute this layer, or None when they can."""
    if not weight.is_cuda:
        return f"the weight is on {weight.device.type}"
    if weight.dtype not in DTYPES:
        return f"the weight is {weight.dtype}, expected 16 bits"
    if recipe.simulate_fp8:
        return "simulate_fp8 rounds operands that the sparse GEMMs do not take"
    if any(size % ALIGNMENT for size in weight.shape):
        return f"the shard is {tuple(weight.shape)}, expected multiples of {ALIGNMENT}"
    if torch.cuda.get_device_capability(weight.device)[0] != 9:
        return "the packed layout is Hopper's (compute capability 9)"
    return None


class PackedSparseGemms(ReferenceSparseGemms):
    """The GEMMs of one step with W~ packed.

    Args:
        effective_NK: W~, 16-bit, 2:4 along K (and N if transposable).
        mvue: how dZ^T is pruned along tokens; "off" leaves the weight gradient dense.
        channels: where the local output channels lie in the whole layer.
        transposable: W~^T is 2:4 as well.
        error_flag: int32 (1,), set on the device if an operand is not 2:4.
    """

    def __init__(
        self,
        effective_NK: torch.Tensor,
        mvue: Mvue,
        channels: tuple[Section, ...],
        transposable: bool,
        error_flag: torch.Tensor,
    ) -> None:
        super().__init__(effective_NK, mvue, channels)
        self._error_flag = error_flag
        self._packed = pack24(self._w_NK, error_flag=error_flag)
        self._packed_t = None
        if transposable:
            self._packed_t = pack24(self._w_NK.t().contiguous(), error_flag=error_flag)
            del self._w_NK  # only the packed operands are needed

    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        return spmm24(self._packed, x_TK)

    def grad_input(self, dz_TN: torch.Tensor) -> torch.Tensor:
        if self._packed_t is None:
            return super().grad_input(dz_TN)
        return spmm24(self._packed_t, dz_TN)

    def grad_weight(self, dz_TN: torch.Tensor, x_TK: torch.Tensor, seed: int) -> torch.Tensor:
        if self._mvue == "off":
            return super().grad_weight(dz_TN, x_TK, seed)
        packed = mvue_pack24(
            dz_TN,
            seed=seed,
            channels=tuple((s.local_start, s.global_start, s.length) for s in self._channels),
            exact=self._mvue == "exact",
            error_flag=self._error_flag,
        )
        missing = packed.shape[1] - x_TK.shape[0]  # tokens of zeros add nothing
        return matmul24(packed, torch.nn.functional.pad(x_TK, (0, 0, 0, missing)))
