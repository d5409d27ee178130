"""The definitions of masked decay and of the flip count, in plain torch."""

from __future__ import annotations

import torch

_CHUNK = 1 << 22


def masked_decay(grad: torch.Tensor, w: torch.Tensor, mask: torch.Tensor, decay: float) -> None:
    """grad += decay * w where `mask` is False; product and sum each rounded to fp32.

    The result is then rounded to `grad`'s dtype. Entries with mask True are not written.
    """
    if grad.dim() == 0 or grad.numel() <= _CHUNK:
        decayed = grad.float() + w.float() * decay
        grad.copy_(torch.where(mask, grad, decayed.to(grad.dtype)))
        return
    # Halve the longest dimension (views of grad) until the fp32 temporaries are small.
    dim = max(range(grad.dim()), key=lambda i: grad.shape[i])
    halves = [tensor.tensor_split(2, dim) for tensor in (grad, w, mask)]
    for g, v, m in zip(*halves):
        masked_decay(g, v, m, decay)


def count_flips(mask_a: torch.Tensor, mask_b: torch.Tensor) -> torch.Tensor:
    """int64 0-d: the number of entries in which two bool masks differ."""
    return torch.count_nonzero(mask_a ^ mask_b)
