"""Packing of 2:4 matrices into the layout of the sparse tensor cores, and back."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import require, set_flag
from megasparse.kernels.current_scaling import scale_inv_of
from megasparse.kernels.pack24 import reference, triton, triton_unpack
from megasparse.kernels.packed24 import (
    COLUMN_MULTIPLE,
    E4M3,
    ROW_MULTIPLE,
    Packed24,
    unit_scale,
)

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, E4M3)


@torch.no_grad()
def pack24(
    w_sparse: torch.Tensor,
    dtype: torch.dtype | None = None,
    scale_inv: torch.Tensor | None = None,
    *,
    error_flag: torch.Tensor | None = None,
    backend: str | None = None,
) -> Packed24:
    """The hardware layout of a 2:4 matrix: equal to cuSPARSELt 0.8's on Hopper, byte for byte.

    A group with fewer than two non-zeros names zeros beside them, the later columns first (so a
    group of zeros names columns 2 and 3), as `prune24_mask` keeps them. -0.0 counts as zero; NaN
    counts as non-zero and is packed.

    Args:
        w_sparse: (N, K), at most 2 non-zeros in each group of 4 along K; N a multiple of 64, K of
            64 (16-bit) or 128 (8-bit). Any row stride; copied unless its rows are contiguous.
        dtype: bfloat16, float16 or float8_e4m3fn; by default that of `w_sparse`. float32 is rounded
            to 16 bits. Wider inputs are quantized to e4m3: values = w * (1 / scale_inv), to nearest
            even, saturated at 448 (infinities too; NaN stays NaN). The columns named are those that
            are non-zero before that.
        scale_inv: 0-d float32 on w's device, above 0: what undoes the scaling, w = values *
            scale_inv, as delayed scaling knows it from earlier steps. The result's `scale` is this
            very tensor. None: amax / 448, 1 when w is zero, which costs a pass over w. Only for
            wider inputs packed as e4m3.
        error_flag: one int32 element on w's device. On CUDA it is set to 1, without a
            synchronization, when a group has more than two non-zeros; the packed result is then
            not w. Without it, and always on the CPU, the call raises.
        backend: None, "reference" or "triton".

    Raises: KernelError on sizes, dtypes, or an input that is not 2:4.
    """
    dtype = _check(w_sparse, dtype, scale_inv)
    require("pack24", "scale_inv", scale_inv, torch.float32, (), w_sparse.device)
    require("pack24", "error_flag", error_flag, torch.int32, None, w_sparse.device)
    pack = dispatch.implementation(
        "pack24", w_sparse, backend, reference=_by_definition, triton=triton.pack24
    )
    asynchronous = w_sparse.is_cuda and error_flag is not None
    flag = error_flag if asynchronous else w_sparse.new_zeros(1, dtype=torch.int32)
    assert flag is not None
    if w_sparse.dtype == torch.float32 and dtype != E4M3:
        w_sparse = w_sparse.to(dtype)
    if w_sparse.dtype == dtype:
        scale_inv = unit_scale(w_sparse.device)
    elif scale_inv is None:
        scale_inv = scale_inv_of(w_sparse, backend=backend)
    packed = pack(w_sparse, dtype, scale_inv, flag)
    if not asynchronous and flag.item():
        raise _not_24(w_sparse)
    return packed


def unpack24(packed: Packed24, *, backend: str | None = None) -> torch.Tensor:
    """The dense (N, K) matrix of a Packed24, row-major.

    Returns: packed.dtype for 16-bit formats, bit for bit what was packed (but +0.0 for dropped
    zeros); float32, values * scale, for e4m3.

    Raises: KernelError when the backend cannot run.
    """
    unpack = dispatch.implementation(
        "unpack24",
        packed.values,
        backend,
        reference=reference.unpack24,
        triton=triton_unpack.unpack24,
    )
    return unpack(packed)


def _by_definition(
    w: torch.Tensor, dtype: torch.dtype, scale_inv: torch.Tensor, flag: torch.Tensor
) -> Packed24:
    packed, crowded = reference.pack24(w, dtype, scale_inv)
    set_flag(flag, crowded)
    return packed


def _check(
    w: torch.Tensor, dtype: torch.dtype | None, scale_inv: torch.Tensor | None
) -> torch.dtype:
    """The dtype to pack as; KernelError when `w` cannot be packed as that."""
    dtype = w.dtype if dtype is None else dtype
    if dtype not in COLUMN_MULTIPLE:
        raise KernelError(f"pack24: dtype is {dtype}, expected bfloat16, float16 or float8_e4m3fn")
    wider = dtype == E4M3 or w.dtype == torch.float32
    if w.dtype not in INPUT_DTYPES or not (w.dtype == dtype or wider):
        raise KernelError(f"pack24: w is {w.dtype}, expected {dtype} or a wider format")
    multiple = COLUMN_MULTIPLE[dtype]
    if w.dim() != 2 or not w.numel() or w.shape[0] % ROW_MULTIPLE or w.shape[1] % multiple:
        raise KernelError(
            f"pack24: w has shape {tuple(w.shape)}, expected multiples of "
            f"({ROW_MULTIPLE}, {multiple}) for {dtype}"
        )
    if scale_inv is not None and (dtype != E4M3 or w.dtype == E4M3):
        raise KernelError(f"pack24: scale_inv is given, expected none to pack {w.dtype} as {dtype}")
    return dtype


def _not_24(w: torch.Tensor) -> KernelError:
    """The error for `w`, naming its first group with more than two non-zeros."""
    count = (w.float() != 0).view(w.shape[0], -1, 4).sum(-1)
    row, group = (int(i) for i in (count > 2).nonzero()[0])
    return KernelError(
        f"pack24: w is not 2:4: row {row}, columns {4 * group} to {4 * group + 3} hold "
        f"{int(count[row, group])} non-zeros, expected at most 2"
    )
