"""A new mask in the place of the old one: flips are counted, the old one is kept, in one pass."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.mask_update import reference, triton


@torch.no_grad()
def replace_mask_(
    mask: torch.Tensor, new: torch.Tensor, before: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Put `new` in the place of `mask`, and the old mask into `before`.

    Args:
        mask, new: bool (N, K), contiguous, K a multiple of 4.
        before: uint8 (N, K/4), contiguous, gets a bit an entry (`patterns.pack_fours`).
        backend: None, "reference" or "triton".

    Returns: int64 0-d, how many entries changed; nothing waits for the device.

    Raises: KernelError for other dtypes, shapes, devices or layouts, or a backend that cannot run.
    """
    shape = (mask.shape[0], mask.shape[-1] // 4)
    for name, tensor, dtype, expected in (
        ("mask", mask, torch.bool, mask.shape),
        ("new", new, torch.bool, mask.shape),
        ("before", before, torch.uint8, shape),
    ):
        fits = tensor.dtype == dtype and tuple(tensor.shape) == tuple(expected)
        if not (fits and tensor.is_contiguous() and tensor.device == mask.device):
            raise KernelError(
                f"replace_mask_: {name} is {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}, expected contiguous {dtype} {tuple(expected)} on {mask.device}"
            )
    if mask.dim() != 2 or mask.shape[1] % 4:
        raise KernelError(
            f"replace_mask_: mask has shape {tuple(mask.shape)}, expected (N, K), K a multiple of 4"
        )
    run = dispatch.implementation(
        "replace_mask_", mask, backend, reference=_by_definition, triton=triton.replace_mask_
    )
    with torch.cuda.device_of(mask):
        return run(mask, new, before)


def _by_definition(mask: torch.Tensor, new: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    packed, flips = reference.replaced(mask, new)
    before.copy_(packed)
    mask.copy_(new)
    return flips
