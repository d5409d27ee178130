"""What `weight_pack24` accepts: its arguments checked; errors name found and expected."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels.checks import WIDE_DTYPES, require, require_if
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, E4M3, ROW_MULTIPLE, Packed24

# W~ packed, and W~^T packed, dense or not wanted.
Operands = tuple[Packed24, Packed24 | torch.Tensor | None]


def check_weight(
    w: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype, transposed: str | None
) -> None:
    """KernelError when `w` cannot be packed as `dtype` in the orientations asked for."""
    name = "weight_pack24"
    if dtype not in COLUMN_MULTIPLE:
        raise KernelError(f"{name}: dtype is {dtype}, expected bfloat16, float16 or float8_e4m3fn")
    if w.dtype not in WIDE_DTYPES or not (w.dtype in (dtype, torch.float32) or dtype == E4M3):
        raise KernelError(f"{name}: w is {w.dtype}, expected {dtype} or a wider format")
    if transposed not in ("packed", "double-pruned", "dense", None):
        raise KernelError(
            f"{name}: transposed={transposed!r}, expected 'packed', 'double-pruned', 'dense' or "
            "None"
        )
    if transposed == "packed" and mask is None:
        raise KernelError(
            f"{name}: transposed='packed' without a mask, expected a transposable mask: "
            "the soft threshold is 2:4 along K only ('double-pruned' makes it so along N)"
        )
    columns = COLUMN_MULTIPLE[dtype]
    rows = columns if transposed in ("packed", "double-pruned") else ROW_MULTIPLE
    if w.dim() != 2 or not w.numel() or w.shape[0] % rows or w.shape[1] % columns:
        raise KernelError(
            f"{name}: w has shape {tuple(w.shape)}, expected multiples of ({rows}, {columns}) "
            f"for {dtype} with transposed={transposed!r}"
        )


def check_tensors(
    w: torch.Tensor,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    threshold_scale: torch.Tensor | None,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    error_flag: torch.Tensor | None,
) -> None:
    """KernelError when a tensor beside `w` is missing, superfluous, or of another kind."""
    op, case = "weight_pack24", f"{'with' if mask is not None else 'without'} a mask for {dtype}"
    require_if(mask is None, op, "threshold_scale", threshold_scale, case)
    require_if(dtype == E4M3, op, "scale", scale, case)
    require(op, "mask", mask, torch.bool, tuple(w.shape), w.device)
    if threshold_scale is not None and threshold_scale.dim():
        count = threshold_scale.numel()
        require(op, "threshold_scale", threshold_scale, torch.float32, (count,), w.device)
        if w.shape[0] % (count * ROW_MULTIPLE):
            raise KernelError(
                f"{op}: {count} threshold scales for {w.shape[0]} rows, expected a multiple of "
                f"{ROW_MULTIPLE} rows for each"
            )
    else:
        require(op, "threshold_scale", threshold_scale, torch.float32, (), w.device)
    require(op, "scale", scale, torch.float32, (), w.device)
    require(op, "amax", amax, torch.float32, (1,), w.device)
    require(op, "error_flag", error_flag, torch.int32, (1,), w.device)


def check_out(out: Operands, w: torch.Tensor, dtype: torch.dtype, transposed: str | None) -> None:
    """KernelError unless `out` is what a call gives for such a `w`."""
    (rows, columns), op = w.shape, "weight_pack24"
    packed, other = out
    _check_packed("out[0]", packed, (rows, columns), dtype, w.device)
    kinds: dict[str | None, type] = {None: type(None), "dense": torch.Tensor}
    if not isinstance(other, kinds.get(transposed, Packed24)):
        raise KernelError(
            f"{op}: out[1] is {type(other).__name__}, expected what transposed={transposed!r} gives"
        )
    if isinstance(other, Packed24):
        _check_packed("out[1]", other, (columns, rows), dtype, w.device)
        if other.scale.data_ptr() != packed.scale.data_ptr():
            raise KernelError(f"{op}: out holds two scales, expected one that both share")
    elif other is not None:
        require(op, "out[1]", other, dtype, (columns, rows), w.device)
        if not other.is_contiguous():
            raise KernelError(f"{op}: out[1] has strides {other.stride()}, expected row-major")


def _check_packed(
    name: str, packed: Packed24, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """KernelError unless it is a Packed24 of this shape in one buffer."""
    op, (rows, columns) = "weight_pack24", shape
    if packed.shape != shape or packed.dtype != dtype:
        raise KernelError(
            f"{op}: {name} is {packed.dtype} of shape {packed.shape}, expected {dtype} {shape}"
        )
    require(op, f"{name}.values", packed.values, dtype, (rows, columns // 2), device)
    require(op, f"{name}.metadata", packed.metadata, torch.uint8, (rows * columns // 8,), device)
    require(op, f"{name}.scale", packed.scale, torch.float32, (), device)
    if not (packed.values.is_contiguous() and packed.in_one_buffer):
        raise KernelError(f"{op}: {name} lies in pieces, expected one buffer, as a call gives it")


def not_24(mask: torch.Tensor | None) -> KernelError:
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
