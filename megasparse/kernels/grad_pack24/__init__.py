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
from megasparse.kernels.swiglu_grad_pack24 import triton as swiglu_triton

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
    _check("grad_pack24", dz, row_dtype, channels)
    check_seed("grad_pack24", seed, dz.device)
    scales, maxima = (row_scale, packed_scale), (row_amax, packed_amax)
    _check_tensors("grad_pack24", dz, row_dtype, scales, maxima, error_flag)
    row, packed, error_flag = _outputs(dz, row_dtype, dz.shape[0], error_flag)
    name = dispatch.resolve("grad_pack24", dz, backend)
    implementation = triton if name == "triton" else reference
    implementation.grad_pack24(dz, seed, channels, exact, scales, row, packed, maxima, error_flag)
    return row, packed


@torch.no_grad()
def swiglu_grad_pack24(
    dy: torch.Tensor,
    fused: torch.Tensor,
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
    """`grad_pack24` of the gradient of a fused projection whose output went into `swiglu_fused`.

    What `swiglu_fused_backward`, rounded to 16 bits, gives to `grad_pack24`: that gradient is never
    written.

    Args:
        dy: (T, F) gradient of the activation's output.
        fused: (T, 2 F) its input [gate | x], of the dtype of dy; F a multiple of 64. Both are read
            row-major (copied otherwise).
        channels: sections of the 2 F channels; none may cross the middle unless what lies on both
            sides of it is adjacent in the whole layer too, and each half is one piece.
        Others: of `grad_pack24`.

    Returns: as `grad_pack24`, (T', 2 F) and (2 F, T'), but the first as long as the second: T' is T
    up to a multiple of 128, with zeros.

    Raises: KernelError on sizes, dtypes, arguments, or a backend that cannot run.
    """
    op = "swiglu_grad_pack24"
    channels = channels or ((0, 0, fused.shape[-1]),)
    _check(op, fused, row_dtype, channels)
    expected = (fused.shape[0], fused.shape[1] // 2)
    if (tuple(dy.shape), dy.dtype, dy.device) != (expected, fused.dtype, fused.device):
        raise KernelError(
            f"{op}: dy is {dy.dtype} {tuple(dy.shape)} on {dy.device}, expected {fused.dtype} "
            f"{expected} on {fused.device}"
        )
    if fused.shape[1] % (2 * ROW_MULTIPLE):
        raise KernelError(
            f"{op}: fused has {fused.shape[1]} channels, expected a multiple of {2 * ROW_MULTIPLE}"
        )
    places = (_place(channels, 0, expected[1]), _place(channels, expected[1], expected[1]))
    check_seed(op, seed, fused.device)
    scales, maxima = (row_scale, packed_scale), (row_amax, packed_amax)
    _check_tensors(op, fused, row_dtype, scales, maxima, error_flag)
    row, packed, error_flag = _outputs(fused, row_dtype, None, error_flag)
    name = dispatch.resolve(op, fused, backend)
    implementation = swiglu_triton if name == "triton" else reference
    implementation.swiglu_grad_pack24(
        dy, fused, seed, places, exact, scales, row, packed, maxima, error_flag
    )
    return row, packed


def _place(channels: Channels, start: int, length: int) -> int:
    """Where channel `start` lies in the whole layer; the `length` channels must lie together."""
    for first, place, size in channels:
        if first <= start and start + length <= first + size:
            return place + start - first
    raise KernelError(
        f"swiglu_grad_pack24: sections {channels} of channels cut one of the halves of {length}"
    )


def _outputs(
    dz: torch.Tensor,
    row_dtype: torch.dtype | None,
    row_tokens: int | None,
    error_flag: torch.Tensor | None,
) -> tuple[torch.Tensor | None, Packed24, torch.Tensor]:
    """Memory for the results: rows (None: as many as the packed part has tokens), packed, flag."""
    (tokens, width), multiple = dz.shape, COLUMN_MULTIPLE[E4M3]
    padded = -(-tokens // multiple) * multiple
    row = None
    if row_dtype is not None:
        shape = (padded if row_tokens is None else row_tokens, width)
        row = torch.empty(shape, dtype=row_dtype, device=dz.device)
    inverse = torch.empty((), dtype=torch.float32, device=dz.device)
    packed = empty_packed((width, padded), E4M3, inverse, dz.device)
    if error_flag is None:
        error_flag = torch.zeros(1, dtype=torch.int32, device=dz.device)
    return row, packed, error_flag


def _check(op: str, dz: torch.Tensor, row_dtype: torch.dtype | None, channels: Channels) -> None:
    """KernelError when dz's shape or the formats do not fit."""
    if dz.dim() != 2 or dz.dtype not in DTYPES or not dz.shape[0]:
        raise KernelError(
            f"{op}: dz is {dz.dtype} of shape {tuple(dz.shape)}, expected 16 bits, (T, N)"
        )
    if row_dtype is not None and row_dtype not in MAXIMUM:
        raise KernelError(
            f"{op}: row_dtype is {row_dtype}, expected float8_e5m2, float8_e4m3fn or None"
        )
    if sum(length for *_, length in channels) != dz.shape[1]:
        raise KernelError(f"{op}: sections {channels} of channels, expected all {dz.shape[1]}")
    if any(start % ROW_MULTIPLE or length % ROW_MULTIPLE for start, _, length in channels):
        raise KernelError(f"{op}: sections {channels}, expected multiples of {ROW_MULTIPLE}")


def _check_tensors(
    op: str,
    dz: torch.Tensor,
    row_dtype: torch.dtype | None,
    scales: tuple[torch.Tensor | None, torch.Tensor],
    maxima: tuple[torch.Tensor | None, torch.Tensor | None],
    error_flag: torch.Tensor | None,
) -> None:
    """KernelError when one does not fit."""
    for argument, tensor, kind, shape, needed in (
        ("row_scale", scales[0], torch.float32, (), row_dtype is not None),
        ("packed_scale", scales[1], torch.float32, (), True),
        ("row_amax", maxima[0], torch.float32, (1,), None),
        ("packed_amax", maxima[1], torch.float32, (1,), None),
        ("error_flag", error_flag, torch.int32, (1,), None),
    ):
        _check_tensor(op, argument, tensor, kind, shape, needed, dz.device)


def _check_tensor(
    op: str,
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
        raise KernelError(f"{op}: {argument} is {found}, expected {expected}")
    if tensor is None:
        return
    if (tensor.dtype, tuple(tensor.shape), tensor.device) != (kind, shape, device):
        raise KernelError(
            f"{op}: {argument} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} "
            f"on {tensor.device}, expected {kind} {shape} on {device}"
        )
