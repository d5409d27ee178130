"""What operations ask of their arguments: groups of 4, tensors of a kind, no NaN in a weight.

A NaN in a weight is an error and never pruned silently. The reference on CPU raises at once. The
Triton kernels set a one-element int32 flag on the weight's device: a caller that passes `nan_flag`
looks at it when it likes (no synchronization here), otherwise it is read right after the launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch

from megasparse.errors import KernelError, NumericsError
from megasparse.kernels import dispatch

GROUP = 4
WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (*WIDE_DTYPES, torch.float8_e4m3fn)

Result = TypeVar("Result")


def require(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None,
    device: torch.device,
) -> None:
    """KernelError unless the argument `name` of `op` is of this kind, or None.

    Args:
        shape: the only one that fits; None: any of one element.
        device: without an index any of its type fits.
    """
    if tensor is None:
        return
    fits = tensor.numel() == 1 if shape is None else tuple(tensor.shape) == shape
    there = tensor.device.type == device.type and device.index in (None, tensor.device.index)
    if not fits or tensor.dtype != dtype or not there:
        raise KernelError(
            f"{op}: {name} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on "
            f"{tensor.device}, expected {dtype} {'of one element' if shape is None else shape} "
            f"on {device}"
        )


def require_power_of_two(op: str, name: str, value: float) -> None:
    """KernelError unless `value` is one, greater than 0."""
    if value <= 0 or math.frexp(value)[0] != 0.5:
        raise KernelError(f"{op}: {name} is {value}, expected a power of two")


def require_if(needed: bool, op: str, name: str, tensor: torch.Tensor | None, when: str) -> None:
    """KernelError unless the argument `name` of `op` is given exactly when it is `needed`.

    Args:
        when: the case, for the error: "without a mask".
    """
    if needed != (tensor is not None):
        found, expected = ("missing", "one") if needed else ("given", "none")
        raise KernelError(f"{op}: {name} is {found}, expected {expected} {when}")


def set_flag(flag: torch.Tensor | None, found: torch.Tensor) -> None:
    """Set `flag` (int32, one element), if there is one, to 1 where `found` (0-d bool) is true."""
    if flag is not None:
        flag.bitwise_or_(found.to(torch.int32))


def check_groups(
    op: str,
    w: torch.Tensor,
    *,
    blocks: bool = False,
    dtypes: tuple[torch.dtype, ...] = WEIGHT_DTYPES,
) -> None:
    """Raise KernelError unless `w` splits into groups of 4 along its last dimension.

    With `blocks` the last two dimensions must both be multiples of 4 (4x4 blocks).
    """
    if w.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelError(f"{op}: dtype {w.dtype}, expected one of {names}")
    dims = 2 if blocks else 1
    if w.dim() < dims or any(size % GROUP for size in w.shape[-dims:]):
        what = "the last two sizes" if blocks else "a last size"
        raise KernelError(f"{op}: shape {tuple(w.shape)}, expected {what} divisible by {GROUP}")


def run_pruning(
    op: str,
    w: torch.Tensor,
    *,
    backend: str | None,
    nan_flag: torch.Tensor | None,
    reference: Callable[[torch.Tensor], Result],
    kernel: Callable[[torch.Tensor, torch.Tensor], Result],
) -> Result:
    """Run `reference(w)` or `kernel(w, flag)` under the NaN law of this module.

    `nan_flag`: None, or int32 with one element on `w`'s device, set to 1 when `w` holds a NaN (the
    result is then meaningless). Raises NumericsError for a NaN when `nan_flag` is None, and on CPU
    whenever the reference runs.
    """
    w = w.detach()
    require(op, "nan_flag", nan_flag, torch.int32, None, w.device)
    if dispatch.resolve(op, w, backend) == "triton":
        flag = nan_flag
        if flag is None:
            flag = torch.zeros(1, dtype=torch.int32, device=w.device)
        with torch.cuda.device_of(w):  # Triton launches on the current device
            result = kernel(w, flag)
        if nan_flag is None and flag.item():
            raise _nan_error(op, w)
        return result
    found = nans(w).any()
    if nan_flag is not None and w.is_cuda:
        set_flag(nan_flag, found)
    elif found.item():
        raise _nan_error(op, w)
    return reference(w)


def nans(w: torch.Tensor) -> torch.Tensor:
    """Bool tensor of `w`'s shape: where `w` is NaN (any float dtype, E4M3 included)."""
    return torch.isnan(w if w.dtype in WIDE_DTYPES else w.float())


def _nan_error(op: str, w: torch.Tensor) -> NumericsError:
    first = int(nans(w).flatten().nonzero()[0])
    position = []
    for size in reversed(w.shape):
        first, index = divmod(first, size)
        position.append(index)
    return NumericsError(
        f"{op}: NaN in the weight of shape {tuple(w.shape)}, first at {tuple(reversed(position))}; "
        "expected numbers"
    )
