"""Masked decay on gradients, and the flip count of two masks (FST)."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import WIDE_DTYPES
from megasparse.kernels.masked_decay import reference, triton

_CHUNK = 1 << 22


def masked_decay_(
    grad: torch.Tensor,
    w: torch.Tensor,
    mask: torch.Tensor,
    decay: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """grad += decay * (1 - mask) * w, in place; returns `grad`.

    The decay of FST (Hu et al., ICML 2024): added to the gradient of the pruned weights
    after clipping, before the optimizer's step. Only entries with mask False change; the others
    keep their bits, even where `w` is infinite or NaN.

    grad, w: float32, bfloat16 or float16 (not necessarily the same), mask: bool, all of one shape
    (any, flat shards included) on one device. Product and sum are rounded to float32 one after the
    other, the result once more to `grad`'s dtype.
    Raises KernelError for other dtypes (an integer mask by name), shapes, devices or backends.
    """
    _check_mask("masked_decay_", "mask", mask)
    for name, tensor in (("grad", grad), ("w", w)):
        if tensor.dtype not in WIDE_DTYPES:
            raise KernelError(
                f"masked_decay_: {name} is {tensor.dtype}, expected float32, bfloat16 or float16"
            )
        _check_same("masked_decay_", name, tensor, "mask", mask)
    apply = dispatch.implementation(
        "masked_decay_", grad, backend, reference=_by_definition, triton=triton.masked_decay_
    )
    with torch.cuda.device_of(grad):
        apply(grad.detach(), w.detach(), mask, decay)
    return grad


def count_flips(
    mask_a: torch.Tensor, mask_b: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """The number of entries in which two masks differ: int64, 0-d, on the masks' device.

    Divided by the number of entries it is FST's flip rate (Hu et al., ICML 2024).
    mask_a, mask_b: bool, of one shape, on one device. Does not synchronize.
    Raises KernelError for other dtypes, shapes, devices or backends.
    """
    _check_mask("count_flips", "mask_a", mask_a)
    _check_mask("count_flips", "mask_b", mask_b)
    _check_same("count_flips", "mask_b", mask_b, "mask_a", mask_a)
    count = dispatch.implementation(
        "count_flips", mask_a, backend, reference=reference.count_flips, triton=triton.count_flips
    )
    with torch.cuda.device_of(mask_a):
        return count(mask_a, mask_b)


def _by_definition(grad: torch.Tensor, w: torch.Tensor, mask: torch.Tensor, decay: float) -> None:
    """In place, in pieces whose temporaries are small: halves of the longest dimension."""
    if grad.dim() == 0 or grad.numel() <= _CHUNK:
        grad.copy_(reference.masked_decay(grad, w, mask, decay))
        return
    dim = max(range(grad.dim()), key=lambda i: grad.shape[i])
    halves = [tensor.tensor_split(2, dim) for tensor in (grad, w, mask)]
    for g, v, m in zip(*halves):
        _by_definition(g, v, m, decay)


def _check_mask(op: str, name: str, mask: torch.Tensor) -> None:
    # An integer mask would pass through `1 - mask` and `~mask` with different meanings.
    if mask.dtype != torch.bool:
        raise KernelError(f"{op}: {name} is {mask.dtype}, expected torch.bool")


def _check_same(
    op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor
) -> None:
    if tensor.shape != other.shape or tensor.device != other.device:
        raise KernelError(
            f"{op}: {name} of shape {tuple(tensor.shape)} on {tensor.device}, expected "
            f"{tuple(other.shape)} on {other.device} as {other_name}"
        )
