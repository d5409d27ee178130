"""A weight's sparse operands in one pass: project, convert or quantise, pack both orientations."""

from __future__ import annotations

from typing import Literal

import torch

from megasparse.errors import KernelError
from megasparse.kernels.checks import WIDE_DTYPES, run_pruning
from megasparse.kernels.packed24 import (
    COLUMN_MULTIPLE,
    E4M3,
    ROW_MULTIPLE,
    Packed24,
    empty_packed,
)
from megasparse.kernels.weight_pack24 import reference, triton
from megasparse.kernels.weight_pack24.reference import effective_weight as effective_weight

Transposed = Literal["packed", "dense"]


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
    backend: str | None = None,
) -> tuple[Packed24, Packed24 | torch.Tensor | None]:
    """The 2:4 weight W~ as the GEMMs read it: along K for the output, along N for grad_input.

    W~ is `W o M` with a mask (FST, Hu et al., ICML 2024), else `beta * S(W)` with S-STE's soft
    threshold S, rounded to w's dtype as `soft_threshold24` gives it (Hu et al., NeurIPS 2024);
    the product is float32. W~ is rounded once, to `dtype`, and then packed as `pack24` does.

    Args:
        w: (N, K) bfloat16, float16 or float32, copied unless contiguous. N a multiple of 64 (for
            e4m3 and `transposed="packed"` of 128), K of 64 (e4m3: 128).
        mask: bool (N, K), True for what is kept, 2:4 along K; along N too ("transposable") with
            `transposed="packed"`. None: the soft threshold.
        threshold_scale: beta, 0-d float32 on w's device; only, and always, without a mask.
        dtype: bfloat16, float16 or float8_e4m3fn; by default w's own. From another 16-bit format
            there is no conversion.
        scale: 0-d finite float32 on the device, only and always for e4m3: values are W~ * scale, to
            nearest even, saturated at 448 (infinities too). The results' `scale` is its reciprocal.
        transposed: "packed": also W~^T (K, N), packed along N. "dense": W~^T as a row-major (K, N)
            tensor of `dtype` (e4m3: times `scale`). None: neither.
        amax: float32 (1,) on w's device, raised to the largest |W~| (before rounding and scaling).
        error_flag: int32 (1,) on w's device. On CUDA it is set to 1, without a synchronisation,
            when the mask keeps more than two in a group that is packed; the result is then not W~.
            Without it, and always on the CPU, the call raises.
        nan_flag: None, or int32 (1,) on w's device. Triton sets it to 1 when `w` holds a NaN (kept
            or not), without synchronising; results and amax are then meaningless.
        backend: None, "reference" or "triton".

    Returns: (W~ packed, what `transposed` asks for). Both Packed24 share one `scale`.

    Raises: KernelError on sizes, dtypes, arguments that exclude each other, a mask that is not 2:4
    or a backend that cannot run; NumericsError for a NaN when `nan_flag` is None, and on the CPU
    with the reference.
    """
    dtype = w.dtype if dtype is None else dtype
    _check(w, mask, dtype, transposed)
    _check_tensors(w, mask, dtype, threshold_scale, scale, amax, error_flag)
    asynchronous = w.is_cuda and error_flag is not None
    flag = error_flag if asynchronous else w.new_zeros(1, dtype=torch.int32)
    assert flag is not None
    rows, columns = w.shape
    inverse = torch.empty((), dtype=torch.float32, device=w.device)
    packed = empty_packed((rows, columns), dtype, inverse, w.device)
    other: Packed24 | torch.Tensor | None = None
    if transposed == "packed":
        other = empty_packed((columns, rows), dtype, inverse, w.device)
    elif transposed == "dense":
        other = torch.empty((columns, rows), dtype=dtype, device=w.device)
    parts = (threshold_scale, scale, packed, other, amax, flag)
    run_pruning(
        "weight_pack24",
        w,
        backend=backend,
        nan_flag=nan_flag,
        reference=lambda w: reference.weight_pack24(w, mask, *parts),
        kernel=lambda w, nan_flag: triton.weight_pack24(w, mask, *parts, nan_flag),
    )
    if not asynchronous and flag.item():
        raise _not_24(mask)
    return packed, other


def _check(
    w: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype, transposed: str | None
) -> None:
    """KernelError when `w` cannot be packed as `dtype` in the orientations asked for."""
    name = "weight_pack24"
    if dtype not in COLUMN_MULTIPLE:
        raise KernelError(f"{name}: dtype is {dtype}, expected bfloat16, float16 or float8_e4m3fn")
    if w.dtype not in WIDE_DTYPES or not (w.dtype in (dtype, torch.float32) or dtype == E4M3):
        raise KernelError(f"{name}: w is {w.dtype}, expected {dtype} or a wider format")
    if transposed not in ("packed", "dense", None):
        raise KernelError(f"{name}: transposed={transposed!r}, expected 'packed', 'dense' or None")
    if transposed == "packed" and mask is None:
        raise KernelError(
            f"{name}: transposed='packed' without a mask, expected a transposable mask: "
            "the soft threshold is 2:4 along K only"
        )
    columns = COLUMN_MULTIPLE[dtype]
    rows = columns if transposed == "packed" else ROW_MULTIPLE
    if w.dim() != 2 or not w.numel() or w.shape[0] % rows or w.shape[1] % columns:
        raise KernelError(
            f"{name}: w has shape {tuple(w.shape)}, expected multiples of ({rows}, {columns}) "
            f"for {dtype} with transposed={transposed!r}"
        )


def _check_tensors(
    w: torch.Tensor,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    threshold_scale: torch.Tensor | None,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    error_flag: torch.Tensor | None,
) -> None:
    """KernelError when a tensor beside `w` is missing, superfluous, or of another kind."""
    wanted = (
        ("mask", mask, torch.bool, tuple(w.shape), None),
        ("threshold_scale", threshold_scale, torch.float32, (), mask is None),
        ("scale", scale, torch.float32, (), dtype == E4M3),
        ("amax", amax, torch.float32, (1,), None),
        ("error_flag", error_flag, torch.int32, (1,), None),
    )
    for name, tensor, kind, shape, needed in wanted:
        if needed is not None and needed != (tensor is not None):
            expected = "one" if needed else "none"
            raise KernelError(
                f"weight_pack24: {name} is {'missing' if needed else 'given'}, expected {expected} "
                f"{'with' if mask is not None else 'without'} a mask for {dtype}"
            )
        if tensor is None:
            continue
        if (tensor.dtype, tuple(tensor.shape), tensor.device) != (kind, shape, w.device):
            raise KernelError(
                f"weight_pack24: {name} is a {tensor.dtype} tensor of shape "
                f"{tuple(tensor.shape)} on {tensor.device}, expected {kind} {shape} on {w.device}"
            )


def _not_24(mask: torch.Tensor | None) -> KernelError:
    """The error for a mask that is not 2:4, naming its first group with more than two True."""
    assert mask is not None, "the soft threshold is 2:4"
    for across, along, m in (("row", "columns", mask), ("column", "rows", mask.t())):
        crowded = (m.reshape(m.shape[0], -1, 4).sum(-1) > 2).nonzero()
        if len(crowded):
            line, first = (int(i) for i in crowded[0] * torch.tensor([1, 4], device=mask.device))
            return KernelError(
                f"weight_pack24: the mask is not 2:4: {across} {line}, {along} {first} to "
                f"{first + 3} keep more than 2, expected at most 2"
            )
    return KernelError("weight_pack24: the mask has changed since it was packed, and was not 2:4")
