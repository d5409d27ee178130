"""One linear of all experts that this rank has, their weights stacked in one parameter.

    weight  (E N, K): E experts, one after the other; rows of fc1 or columns of fc2 are cut over the
            tensor-parallel ranks, as those of any other FFN

One parameter, so that masks, scales, packing and updates of a layer's experts are one launch each.
There is no communication here: the dispatcher brings tokens to their experts, and adds up the
partial sums of tensor-parallel ranks when it takes them back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megasparse.errors import ConfigError
from megasparse.megatron.init import mark_experts
from megasparse.megatron.parallel_linear import ParallelLinear
from megasparse.sparsity.autograd.experts import expert_linear
from megasparse.sparsity.autograd.linear import Seed
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.experts import DenseExpertGemms
from megasparse.sparsity.shard import WeightShard


class ExpertLinear(ParallelLinear):
    """`z_e = x_e W_e^T` for the tokens of each expert.

    Args:
        config: of the layers; says whether dense GEMMs are grouped.
        inputs, outputs: of one expert, over all tensor-parallel ranks.
        dim: 0: outputs are cut over tensor-parallel ranks, 1: inputs.
        parts: matrices that are fused along the outputs (2 for gate and up).
        experts: of this rank.
        tp_group: ranks that share each expert.
        ep_group: ranks that share the experts of the layer.

    Attributes:
        experts: of this rank; first, total: number of its first, and of all of the layer.
    """

    def __init__(
        self,
        config: Any,
        inputs: int,
        outputs: int,
        dim: int,
        parts: int,
        experts: int,
        tp_group: dist.ProcessGroup,
        ep_group: dist.ProcessGroup,
    ) -> None:
        block, blocks = ep_group.rank(), ep_group.size()
        fused = parts * experts if dim == 0 else 1
        shard = WeightShard(
            (outputs * experts * blocks, inputs),
            dim,
            tp_group.rank(),
            tp_group.size(),
            fused,
            block,
            blocks,
        )
        super().__init__(config, shard, False, False, False, tp_group)
        self.experts, self.first, self.total = experts, block * experts, experts * blocks
        mark_experts(self.weight, experts, block, blocks)

    @property
    def draws(self) -> bool:
        """Whether the tokens' places are wanted: MVUE draws by them."""
        return self.state is not None and self.state.recipe.mvue != "off"

    def _gemms_of_step(self, weight: torch.Tensor | None = None) -> tuple[Any, Seed]:
        controller, grouped = self._controller, self.config.moe_grouped_gemm
        if controller is not None:
            controller.begin_forward()
        if controller is None or controller.calibrating:
            return DenseExpertGemms(self.experts, grouped, self.weight), 0
        step = controller.clock.step
        if self.dense is not None:
            return self.dense.gemms(self.weight, step), 0
        if self.state is None:
            return DenseExpertGemms(self.experts, grouped, self.weight), 0
        gemms = self.state.gemms(self.weight, step, controller.sparse_now, controller.monitor)
        return gemms, controller.step_seed(self._place)

    def freeze_in_fp8(self) -> int:
        """Refused: weights of experts are not kept in 8 bits alone."""
        raise ConfigError("the experts of a model cannot be kept in FP8, expected bf16")

    def forward(self, x: torch.Tensor, tokens: ExpertTokens, how: tuple[Any, Seed]) -> torch.Tensor:
        """`(T', K)`, rows as `tokens` says -> `(T', N)`; a partial sum where the inputs are cut.

        Args:
            how: `current_gemms`, asked for before the rows were made.
        """
        gemms, seed = how
        return expert_linear(x, self.weight, gemms, tokens, seed)

    def extra_repr(self) -> str:
        """As of every linear, with the number of experts."""
        return f"{self.experts} of {self.total} experts, {super().extra_repr()}"
