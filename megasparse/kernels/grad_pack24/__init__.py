"""Both operands that a gradient becomes, in one pass: quantised, and sparse along tokens."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.float8 import E5M2, MAXIMUM
from megasparse.kernels.grad_pack24 import reference, triton
from megasparse.kernels.mvue_pack24 import Channels
from megasparse.kernels.packed24 import (
    COLUMN_MULTIPLE,
    E4M3,
    ROW_MULTIPLE,
    Packed24,
    empty_packed,
)
from megasparse.kernels.random import SeedLike, check_seed

DTYPES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def grad_pack24(
    dz: torch.Tensor,
    *,
    seed: SeedLike,
    row_scale: torch.Tensor | None = None,
    row_dtype: torch.dtype | None = E5M2,
    packed_scale: torch.Tensor,
    channels: Channels | None = None,
    exact: bool = True,
    row_amax: torch.Tensor | None = None,
    packed_amax: torch.Tensor | None = None,
    error_flag: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, Packed24]:
    """dZ quantised for grad_input, and MVUE(dZ^T), 2:4 along tokens, quantised for grad_weight.

    The second is what `mvue24(dz.float(), seed=seed, dim=0).t()`, quantised to e4m3, gives to
    `pack24`: the draws are those of `mvue24`, kept values are rounded once. One that vanishes in
    e4m3 counts as zero.

    Args:
        dz: (T, N) output gradient, bfloat16 or float16, row-major (copied otherwise); N a multiple
            of 64, any T (tokens of zeros fill the packed part up to a multiple of 128).
        seed: as `mvue24`.
        row_scale: 0-d float32 on dz's device; only and always with `row_dtype`. The row-major copy
            is dz * row_scale, to nearest even, saturated (infinities too); NaN stays NaN.
        row_dtype: float8_e5m2, float8_e4m3fn, or None for the packed part alone.
        packed_scale: 0-d float32 on dz's device: packed values are MVUE(dz) * packed_scale as
            e4m3, likewise. The result's `scale` is its reciprocal.
        channels: where the channels lie in the whole layer, in sections whose sizes are multiples
            of 64; by default they are the layer's first.
        exact: the exact sampler, or the papers' approximation.
        row_amax, packed_amax: float32 (1,) on dz's device, raised to the largest |dz| and
            |MVUE(dz)| (before scaling); a NaN makes them NaN.
        error_flag: int32 (1,) on dz's device, set when a packed group has more than two non-zeros
            (which only infinities and NaN can cause).
        backend: None, "reference" or "triton".

    Returns: ((T, N) of row_dtype or None, Packed24 of (N, T up to a multiple of 128)).

    Raises: KernelError on sizes, dtypes, arguments, or a backend that cannot run.
    """
    channels = channels or ((0, 0, dz.shape[-1]),)
    _check(dz, row_dtype, channels)
    check_seed("grad_pack24", seed, dz.device)
    for argument, tensor, kind, shape, needed in (
        ("row_scale", row_scale, torch.float32, (), row_dtype is not None),
        ("packed_scale", packed_scale, torch.float32, (), True),
        ("row_amax", row_amax, torch.float32, (1,), None),
        ("packed_amax", packed_amax, torch.float32, (1,), None),
        ("error_flag", error_flag, torch.int32, (1,), None),
    ):
        _check_tensor(argument, tensor, kind, shape, needed, dz.device)
    (tokens, width), multiple = dz.shape, COLUMN_MULTIPLE[E4M3]
    row = None
    if row_dtype is not None:
        row = torch.empty((tokens, width), dtype=row_dtype, device=dz.device)
    inverse = torch.empty((), dtype=torch.float32, device=dz.device)
    packed = empty_packed((width, -(-tokens // multiple) * multiple), E4M3, inverse, dz.device)
    if error_flag is None:
        error_flag = torch.zeros(1, dtype=torch.int32, device=dz.device)
    name = dispatch.resolve("grad_pack24", dz, backend)
    implementation = triton if name == "triton" else reference
    scales, maxima = (row_scale, packed_scale), (row_amax, packed_amax)
    implementation.grad_pack24(dz, seed, channels, exact, scales, row, packed, maxima, error_flag)
    return row, packed


def _check(dz: torch.Tensor, row_dtype: torch.dtype | None, channels: Channels) -> None:
    """KernelError when dz's shape or the formats do not fit."""
    if dz.dim() != 2 or dz.dtype not in DTYPES or not dz.shape[0]:
        raise KernelError(
            f"grad_pack24: dz is {dz.dtype} of shape {tuple(dz.shape)}, expected 16 bits, (T, N)"
        )
    if row_dtype is not None and row_dtype not in MAXIMUM:
        raise KernelError(
            f"grad_pack24: row_dtype is {row_dtype}, expected float8_e5m2, float8_e4m3fn or None"
        )
    if sum(length for *_, length in channels) != dz.shape[1]:
        raise KernelError(
            f"grad_pack24: sections {channels} of channels, expected all {dz.shape[1]}"
        )
    if any(start % ROW_MULTIPLE or length % ROW_MULTIPLE for start, _, length in channels):
        raise KernelError(f"grad_pack24: sections {channels}, expected multiples of {ROW_MULTIPLE}")


def _check_tensor(
    argument: str,
    tensor: torch.Tensor | None,
    kind: torch.dtype,
    shape: tuple[int, ...],
    needed: bool | None,
    device: torch.device,
) -> None:
    """KernelError when the tensor is missing, superfluous, or of another kind."""
    if needed is not None and needed != (tensor is not None):
        found, expected = ("missing", "one") if needed else ("given", "none without row_dtype")
        raise KernelError(f"grad_pack24: {argument} is {found}, expected {expected}")
    if tensor is None:
        return
    if (tensor.dtype, tuple(tensor.shape), tensor.device) != (kind, shape, device):
        raise KernelError(
            f"grad_pack24: {argument} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} "
            f"on {tensor.device}, expected {kind} {shape} on {device}"
        )
