"""An activation that leaves as the operands of an 8-bit GEMM, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.activation_float8 import reference, triton
from megasparse.kernels.checks import require
from megasparse.kernels.factors import Factors, Lacking, given, lacking
from megasparse.kernels.float8 import check_parts, check_scaling, raise_amax

DTYPES = (torch.bfloat16, torch.float16)
WIDTH_MULTIPLE = 64


@torch.no_grad()
def activation_float8(
    fused: torch.Tensor,
    *,
    scale: torch.Tensor,
    activation: Activation = "swiglu",
    transposed: bool = True,
    strided: bool = False,
    amax: torch.Tensor | None = None,
    factors: Factors | None = None,
    weights: torch.Tensor | None = None,
    counts: Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The activation of `fused` = [gate | x], quantized to e4m3, row-major and transposed.

    What `activated`, rounded to the dtype of `fused`, times `scale`, saturated, gives: the 16-bit
    activation is never written.

    Args:
        fused: (T, 2 F), for "gelu" (T, F), bfloat16 or float16, read row-major (copied otherwise);
            any T, F a multiple of 64.
        scale: 0-d float32 on the device of `fused`, the multiplier; to nearest even, saturated
            (infinities too); NaN stays NaN.
        activation: "swiglu", "geglu" or "gelu".
        transposed: whether the transposed copy is wanted.
        strided: its tokens in the order of strided groups (`token_order.by_groups`).
        amax: float32 (1,) there, raised to the largest magnitude before scaling; a NaN makes it
            NaN.
        factors: what `fused` lacks (`kernels/factors.py`), a power of two; None: nothing.
        weights: (T,) float32: it is `weighted_activation` that leaves. None: without weights.
        counts: tokens of each expert, multiples of 128, T in all: the transposed copy is the
            (F, T_e) of each, one after the other (`float8.blocks_of`). Not strided.
        backend: None, "reference" or "triton".

    Returns: ((T', F), (F, T') or None) float8_e4m3fn, outside autograd; T' is T up to a multiple of
    128, with zeros. With counts (F T',) in place of the second.

    Raises: KernelError on sizes, dtypes, or a backend that cannot run.
    """
    parts = 1 + is_gated(activation)
    if (
        fused.dim() != 2
        or fused.dtype not in DTYPES
        or not fused.shape[0]
        or fused.shape[1] % (parts * WIDTH_MULTIPLE)
    ):
        raise KernelError(
            f"activation_float8: fused is {fused.dtype} of shape {tuple(fused.shape)}, expected 16 "
            f"bits, (T, {'2 F' if parts == 2 else 'F'}), F a multiple of {WIDTH_MULTIPLE}"
        )
    check_scaling("activation_float8", fused.device, scale, amax)
    rows = (fused.shape[0],)
    require("activation_float8", "weights", weights, torch.float32, rows, fused.device)
    if counts is not None:
        check_parts("activation_float8", counts, fused.shape[0])
        if strided:
            raise KernelError(
                "activation_float8: groups are strided, expected neighbours of experts"
            )
    run = dispatch.implementation(
        "activation_float8",
        fused,
        backend,
        reference=_by_definition,
        triton=triton.activation_float8,
    )
    lacks = lacking("activation_float8", factors, fused.device)
    return run(fused, scale, activation, transposed, strided, amax, lacks, weights, counts)


def _by_definition(
    fused: torch.Tensor,
    scale: torch.Tensor,
    activation: Activation,
    transposed: bool,
    strided: bool,
    amax: torch.Tensor | None,
    factors: Lacking,
    weights: torch.Tensor | None,
    counts: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, columns, found = reference.activation_float8(
        given(fused, factors), scale, activation, transposed, strided, weights, counts
    )
    raise_amax(amax, found)
    return rows, columns
