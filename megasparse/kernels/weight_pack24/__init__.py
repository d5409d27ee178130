"""A weight's sparse operands in one pass: project, convert or quantize, pack both orientations."""

from __future__ import annotations

from typing import Literal

import torch

from megasparse.kernels.checks import run_pruning, set_flag
from megasparse.kernels.float8 import raise_amax
from megasparse.kernels.packed24 import empty_packed
from megasparse.kernels.weight_pack24 import reference, triton
from megasparse.kernels.weight_pack24.arguments import (
    Operands,
    check_out,
    check_tensors,
    check_weight,
    not_24,
)
from megasparse.kernels.weight_pack24.reference import effective_weight as effective_weight

Transposed = Literal["packed", "double-pruned", "dense"]


@torch.no_grad()
def weight_pack24(
    w: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    threshold_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: torch.Tensor | None = None,
    transposed: Transposed | None = "packed",
    amax: torch.Tensor | None = None,
    error_flag: torch.Tensor | None = None,
    nan_flag: torch.Tensor | None = None,
    out: Operands | None = None,
    backend: str | None = None,
) -> Operands:
    """The 2:4 weight W~ as the GEMMs read it: along K for the output, along N for grad_input.

    W~ is `W o M` with a mask (FST, Hu et al., ICML 2024), else `beta * S(W)` with S-STE's soft
    threshold S, rounded to w's dtype as `soft_threshold24` gives it (Hu et al., NeurIPS 2024);
    the product is float32. W~ is rounded once, to `dtype`, and then packed as `pack24` does.

    Args:
        w: (N, K) bfloat16, float16 or float32, copied unless contiguous. N a multiple of 64 (for
            e4m3 and a packed W~^T of 128), K of 64 (e4m3: 128).
        mask: bool (N, K), True for what is kept, 2:4 along K; along N too ("transposable") with
            `transposed="packed"`. None: the soft threshold.
        threshold_scale: beta, 0-d float32 on w's device; only, and always, without a mask. (E,):
            of E weights that are stacked in w, each of a multiple of 64 rows.
        dtype: bfloat16, float16 or float8_e4m3fn; by default w's own. From another 16-bit format
            there is no conversion.
        scale: 0-d finite float32 on the device, only and always for e4m3: values are W~ * scale, to
            nearest even, saturated at 448 (infinities too). The results' `scale` is its reciprocal.
        transposed: "packed": also W~^T (K, N), packed along N. "double-pruned": of each four of W~
            along N, as they were rounded to `dtype`, the two largest magnitudes (of equals the
            later row), packed so: any mask or soft threshold will do (SLoPe, Mozaffari et al.,
            2024, with a mask of the moment). "dense": W~^T as a row-major (K, N) tensor of `dtype`
            (e4m3: times `scale`). None: neither.
        amax: float32 (1,) on w's device, raised to the largest |W~| (before rounding and scaling).
        error_flag: int32 (1,) on w's device. On CUDA it is set to 1, without a synchronization,
            when the mask keeps more than two in a group that is packed; the result is then not W~.
            Without it, and always on the CPU, the call raises.
        nan_flag: None, or int32 (1,) on w's device. Triton sets it to 1 when `w` holds a NaN (kept
            or not), without synchronizing; results and amax are then meaningless.
        out: what an earlier call gave for the same shape, `dtype` and `transposed`: it is filled in
            place (scales too) and returned. So addresses stay from step to step, and with both
            flags a call on CUDA allocates nothing.
        backend: None, "reference" or "triton".

    Returns: (W~ packed, what `transposed` asks for). Both Packed24 share one `scale`.

    Raises: KernelError on sizes, dtypes, arguments that exclude each other, a mask that is not 2:4
    or a backend that cannot run; NumericsError for a NaN when `nan_flag` is None, and on the CPU
    with the reference.
    """
    dtype = w.dtype if dtype is None else dtype
    check_weight(w, mask, dtype, transposed)
    check_tensors(w, mask, dtype, threshold_scale, scale, amax, error_flag)
    if out is not None:
        check_out(out, w, dtype, transposed)
    asynchronous = w.is_cuda and error_flag is not None
    flag = error_flag if asynchronous else w.new_zeros(1, dtype=torch.int32)
    assert flag is not None
    arguments = (mask, threshold_scale, dtype, scale, transposed, amax, flag, out)
    operands = run_pruning(
        "weight_pack24",
        w,
        backend=backend,
        nan_flag=nan_flag,
        reference=lambda w: _by_definition(w, *arguments),
        kernel=lambda w, nan_flag: _by_triton(w, nan_flag, *arguments),
    )
    if not asynchronous and flag.item():
        raise not_24(mask)
    return operands


def _by_definition(
    w: torch.Tensor,
    mask: torch.Tensor | None,
    threshold_scale: torch.Tensor | None,
    dtype: torch.dtype,
    scale: torch.Tensor | None,
    transposed: str | None,
    amax: torch.Tensor | None,
    flag: torch.Tensor,
    out: Operands | None,
) -> Operands:
    packed, other, largest, crowded = reference.weight_pack24(
        w, mask, threshold_scale, dtype, scale, transposed
    )
    raise_amax(amax, largest)
    set_flag(flag, crowded)
    if out is None:
        return packed, other
    out[0].copy_(packed)
    if out[1] is not None:
        out[1].copy_(other)  # type: ignore[arg-type]  # `check_out`: both are of one kind
    return out


def _by_triton(
    w: torch.Tensor,
    nan_flag: torch.Tensor,
    mask: torch.Tensor | None,
    threshold_scale: torch.Tensor | None,
    dtype: torch.dtype,
    scale: torch.Tensor | None,
    transposed: str | None,
    amax: torch.Tensor | None,
    flag: torch.Tensor,
    out: Operands | None,
) -> Operands:
    if out is None:
        out = _new(w, dtype, transposed)
    prune = transposed == "double-pruned"
    triton.weight_pack24(w, mask, threshold_scale, scale, *out, prune, amax, flag, nan_flag)
    return out


def _new(w: torch.Tensor, dtype: torch.dtype, transposed: str | None) -> Operands:
    """Memory for the operands of `w`."""
    rows, columns = w.shape
    scale_inv = torch.empty((), dtype=torch.float32, device=w.device)
    packed = empty_packed((rows, columns), dtype, scale_inv, w.device)
    if transposed in ("packed", "double-pruned"):
        return packed, empty_packed((columns, rows), dtype, scale_inv, w.device)
    if transposed == "dense":
        return packed, torch.empty((columns, rows), dtype=dtype, device=w.device)
    return packed, None
