"""What operations ask of their arguments: groups of 4, tensors of a kind, no NaN in a weight.

A NaN in a weight is an error and never pruned silently. The reference on CPU raises at once. The
Triton kernels set a one-element int32 flag on the weight's device: a caller that passes `nan_flag`
looks at it when it likes (no synchronisation here), otherwise it is read right after the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from megasparse.errors import KernelError, NumericsError
from megasparse.kernels import dispatch

GROUP = 4
WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (*WIDE_DTYPES, torch.float8_e4m3fn)

Result = TypeVar("Result")


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
    if nan_flag is not None:
        _check_flag(op, w, nan_flag)
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
        nan_flag.bitwise_or_(found.to(torch.int32))
    elif found.item():
        raise _nan_error(op, w)
    return reference(w)


def nans(w: torch.Tensor) -> torch.Tensor:
    """Bool tensor of `w`'s shape: where `w` is NaN (any float dtype, E4M3 included)."""
    return torch.isnan(w if w.dtype in WIDE_DTYPES else w.float())


def _check_flag(op: str, w: torch.Tensor, nan_flag: torch.Tensor) -> None:
    good = nan_flag.dtype == torch.int32 and nan_flag.numel() == 1 and nan_flag.device == w.device
    if not good:
        raise KernelError(
            f"{op}: nan_flag is {nan_flag.dtype} with {nan_flag.numel()} elements on "
            f"{nan_flag.device}, expected int32 with 1 element on {w.device}"
        )


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
