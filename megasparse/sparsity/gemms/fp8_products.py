"""Products of scaled 8-bit operands, with the scaling undone.

cuSPARSELt takes the factor of a product from the host. Delayed scaling has it there. A factor of
current scaling is on the device alone: the product is made without it (448 * 448 * K is far inside
bfloat16's range) and multiplied in place afterwards, which rounds it to bfloat16 a second time.
Dense GEMMs take both factors from the device.
"""

from __future__ import annotations

import torch

from megasparse.fp8.current import Scaling
from megasparse.kernels import rescale_


def scaled_mm(a_TK: torch.Tensor, b_NK: torch.Tensor, a: Scaling, b: Scaling) -> torch.Tensor:
    """`a b^T` (T, N) bfloat16 of two 8-bit matrices with their scaling undone: a dense GEMM."""
    if not a_TK.is_cuda:
        factor = alpha_of(a, b) if _on_host(a, b) else a.inverse * b.inverse
        return (a_TK.float() @ b_NK.float().t() * factor).to(torch.bfloat16)
    return torch._scaled_mm(
        a_TK, b_NK.t(), a.inverse, b.inverse,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def _on_host(a: Scaling, b: Scaling) -> bool:
    return a.factor is not None and b.factor is not None


def alpha_of(a: Scaling, b: Scaling) -> float:
    """What a 2:4 product of two operands is multiplied by in the library; without it: by 1."""
    return 1.0 if a.factor is None or b.factor is None else a.factor * b.factor


def undone(product: torch.Tensor, a: Scaling, b: Scaling) -> torch.Tensor:
    """The product with the scaling undone that the library could not undo; in place."""
    return product if _on_host(a, b) else rescale_(product, a.inverse, b.inverse)


def key_suffix(scaling: Scaling) -> str:
    """Of a key of the chooser: a second pass over the product counts for the 2:4 one."""
    return ", current scaling" if scaling.factor is None else ""
