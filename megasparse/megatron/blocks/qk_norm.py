"""An RMSNorm over all heads of the queries, or of the keys, together (OLMo-2)."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm of vectors whose heads are divided over tensor-parallel ranks.

    A rank has the weights of its heads. The mean square is that of all heads: its sum goes over the
    ranks, and so does its gradient.

    Args:
        hidden_size: of a head.
        config: of the layers.
        eps: added to the mean square.
        heads: of all ranks.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, heads: int) -> None:
        super().__init__()
        self._ranks = config.tensor_model_parallel_size
        self.eps, self._width = eps, heads * hidden_size
        here = (heads // self._ranks, hidden_size)
        self._heads = here
        self.weight = torch.nn.Parameter(torch.ones(here[0] * here[1], dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(S, B, heads, D)` of this rank's heads to the same."""
        wide = x.float()
        total = wide.square().sum((-2, -1), keepdim=True)
        if self._ranks > 1:
            total = mappings.copy_to_tensor_model_parallel_region(
                mappings.reduce_from_tensor_model_parallel_region(total)
            )
        normed = wide * torch.rsqrt(total / self._width + self.eps)
        return (normed * self.weight.view(self._heads)).to(x.dtype)
