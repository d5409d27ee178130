"""Cross entropy of vocabulary-parallel logits, token by token, and means over tokens that count.

megatron-core's own makes several float32 tensors of the logits' size. Transformer Engine's kernels
read 16-bit logits, compute in float32 in registers and keep one 16-bit copy, which becomes the
gradient: used on GPUs where it is installed.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy


def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Transformer Engine computes the cross entropy of such logits."""
    there = te_parallel_cross_entropy is not None
    return there and device.type == "cuda" and dtype == torch.bfloat16


def token_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float32 `(a, b)`: -log softmax(logits)[label]; overwrites float32 logits.

    Args:
        logits: `(a, b, V / tp)`.
        labels: `(a, b)` int64.
    """
    if fused(logits.device, logits.dtype):
        group = parallel_state.get_tensor_model_parallel_group()
        return te_parallel_cross_entropy(logits, labels.contiguous(), group)
    return tensor_parallel.vocab_parallel_cross_entropy(logits, labels)


def masked_sum(losses: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the losses that count, how many count), both 0-d.

    Args:
        losses: `(a, b)` floating point, in which it is summed.
        mask: `(a, b)`, 1 or True for tokens that count.
    """
    return (losses * mask).sum(), mask.sum()


def masked_mean(
    losses: torch.Tensor, mask: torch.Tensor, divisor: torch.Tensor | None = None
) -> torch.Tensor:
    """0-d float32: mean of the losses that count; 0 if none does.

    Args:
        losses, mask: see `masked_sum`.
        divisor: 0-d, what their sum is divided by; None: how many count here, at least 1.
    """
    total, count = masked_sum(losses.float(), mask)
    return total / (count.clamp(min=1.0) if divisor is None else divisor)
