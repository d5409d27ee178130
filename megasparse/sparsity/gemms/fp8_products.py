"""Products of scaled 8-bit operands, with the scaling undone.

cuSPARSELt takes the factor of a product from the host, once and for all in a captured step. It is
given the factor that the host assumes (`fp8/scale.py`); where the device knows another one, the
product is corrected in place. Factors are powers of two, so the correction is exact, and where
nothing is to correct its kernel ends at once. Dense GEMMs take both factors from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megasparse.fp8.scale import Scale
from megasparse.kernels import rescale_
from megasparse.kernels.factors import Factors
from megasparse.sparsity.gemms.protocol import Deferred


def scaled_mm(
    a_TK: torch.Tensor,
    b_NK: torch.Tensor,
    a: Scale,
    b: Scale,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`a b^T + bias` (T, N) bfloat16 of two 8-bit matrices with their scaling undone: a dense GEMM.

    Args:
        bias: `(N,)` bfloat16.
        out: `(T, N)` bfloat16: gets the result.
    """
    if not a_TK.is_cuda:
        factor = a.scale_inv * b.scale_inv
        product = a_TK.float() @ b_NK.float().t() * factor
        product = (product if bias is None else product + bias).to(torch.bfloat16)
        return product if out is None else out.copy_(product)
    return torch._scaled_mm(
        a_TK,
        b_NK.t(),
        a.scale_inv,
        b.scale_inv,
        bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        **({} if out is None else {"out": out}),
    )


def with_factors(
    product: Callable[[float], torch.Tensor], a: Scale, b: Scale
) -> tuple[torch.Tensor, Factors | None]:
    """A 2:4 product of two operands, and the factors that undo what is left of their scaling."""
    alpha = a.assumed * b.assumed
    factors = None if a.exact and b.exact else (a.scale_inv, b.scale_inv, alpha)
    return product(alpha), factors


def undone(
    product: Callable[..., torch.Tensor],
    a: Scale,
    b: Scale,
    bias: torch.Tensor | None = None,
    deferred: Deferred | None = None,
) -> torch.Tensor:
    """A 2:4 product of two operands with their scaling undone, and a bias.

    Args:
        product: computes it with a factor, the library's alpha, and where there is one with a
            `bias` and its `bias_factors`, as `spmm24` does.
        bias: what the result is to have; what is corrected with it is divided before.
        deferred: gets what the product still lacks, so that nothing is corrected here.
    """
    alpha = a.assumed * b.assumed
    added: dict[str, Any] = {} if bias is None else {"bias": bias}
    if a.exact and b.exact:
        return product(alpha, **added)
    if bias is not None:
        added["bias_factors"] = (a.scale, b.scale, 1 / alpha)
    result = product(alpha, **added)
    if deferred is not None:
        deferred.factors = (a.scale_inv, b.scale_inv, alpha)
        return result
    return rescale_(result, a.scale_inv, b.scale_inv, applied=alpha)
