"""Tensor- and sequence-parallel linear layers around the three-GEMM seam.

Drop-in replacements for megatron-core's `ColumnParallelLinear` and `RowParallelLinear` (same
constructor, same `(output, bias)` result). They are dense until `make_sparse` gives them a state:
which layers that happens to is decided outside, by name (`megatron/sparsify.py`).

    column   W (N/p, K): x is whole or gathered over the sequence; dx is summed or scattered back
    row      W (N, K/p): z is summed, or scattered over the sequence

With sequence parallelism (sp) the input of a column layer and the output of a row layer are split
over the sequence, dimension 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.utils import get_tensor_model_parallel_group_if_none

from megasparse.fp8.shapes import TILE
from megasparse.kernels.factors import Factors
from megasparse.megatron import layer_state
from megasparse.megatron.added_parameters import AddedParameters
from megasparse.megatron.comm.linear import (
    GatherOverSequence,
    SumOverTensorParallel,
    sum_over_sequence,
)
from megasparse.megatron.context.share import token_share
from megasparse.megatron.init import initialize_by, mark_sharded
from megasparse.sparsity.autograd.linear import LinearComm, NoComm, Seed, linear
from megasparse.sparsity.autograd.norm import Float8Input
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.gemms.dense import DenseGemms
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gemms.frozen_fp8 import Fp8StoredGemms
from megasparse.sparsity.gemms.named import under_name
from megasparse.sparsity.gemms.protocol import Deferred, LinearGemms
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight


class ParallelLinear(AddedParameters):
    """Parameters and GEMMs that both kinds share.

    Attributes:
        weight: local master weight `(N_local, K_local)`; initialised by `init_method`, or where
            `config.perform_initialization` is off by the caller (`megatron/init.py`).
        bias: `(N_local,)` or None.
        shard, tokens: where the local weight and tokens lie in the whole.
        state: sparsity state, or None for a dense layer.
        dense: the FP8 operands of a dense layer, or None where its GEMMs are not in FP8.
    """

    def __init__(
        self,
        config: Any,
        shard: WeightShard,
        bias: bool,
        bias_is_sharded: bool,
        skip_bias_add: bool,
        tp_group: dist.ProcessGroup,
        init_method: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.shard, self.tokens = shard, token_share(config)
        self.skip_bias_add = skip_bias_add
        self.tp_group = tp_group
        self.sequence_parallel = config.sequence_parallel and tp_group.size() > 1
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        options = {"dtype": config.params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.empty(shard.local_shape, **options))
        if init_method is not None and getattr(config, "perform_initialization", False):
            initialize_by(self.weight, shard, init_method, config)
        else:
            mark_sharded(self.weight, shard)
        self.bias: torch.nn.Parameter | None = None
        if bias:
            length = shard.local_shape[0]
            self.bias = torch.nn.Parameter(torch.zeros(length, **options))
            if bias_is_sharded:
                whole = (shard.global_shape[0],)
                mark_sharded(self.bias, WeightShard(whole, 0, shard.rank, shard.world, shard.parts))
            else:
                self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.state: SparseWeight | None = None
        self.dense: DenseFp8Weight | None = None
        self._controller: SparsityController | None = None
        self._place = 0
        self._frozen: Fp8StoredGemms | None = None
        self.profiled_as: str | None = None  # its name, while a profiler runs

    def make_sparse(self, state: SparseWeight, controller: SparsityController, number: int) -> None:
        """Give the layer a sparsity state; from then on the recipe's GEMMs compute it.

        Args:
            state: of this layer's weight.
            controller: knows the step and the phase.
            number: names the layer's random draws; a function of its name in the whole model.
        """
        self.state, self._controller = state, controller
        self._place = controller.register(state, self.weight, number)

    def make_dense_fp8(self, weight: DenseFp8Weight, controller: SparsityController) -> None:
        """Compute a layer that stays dense in FP8.

        Args:
            weight: the operands of this layer's weight.
            controller: knows the step.
        """
        self.dense, self._controller = weight, controller
        controller.dense.append((weight, self.weight))

    def freeze_in_fp8(self) -> int:
        """Keep the weight in FP8 alone, for a layer that is never trained; its bytes then."""
        self._frozen = Fp8StoredGemms(self.weight)
        self.weight = torch.nn.Parameter(self.weight.detach().new_empty(0), requires_grad=False)
        return self._frozen.bytes_here

    def current_gemms(self, weight: torch.Tensor | None = None) -> tuple[LinearGemms, Seed]:
        """The GEMMs of the current step, and the seed of this layer's draws.

        Args:
            weight: with its scales; default: the master weight.
        """
        gemms, seed = self._gemms_of_step(weight)
        return under_name(gemms, self.profiled_as), seed

    def _gemms_of_step(self, weight: torch.Tensor | None) -> tuple[LinearGemms, Seed]:
        if self._frozen is not None:
            return self._frozen, 0
        controller = self._controller
        if controller is not None:
            controller.begin_forward()
        if self.dense is not None and controller is not None and not controller.calibrating:
            return self.dense.gemms(self.weight, controller.clock.step), 0
        if weight is None:
            weight = self.weight
        if self.state is None or controller is None or controller.calibrating:
            return DenseGemms(weight), 0
        clock, sparse = controller.clock, controller.sparse_now
        if self.state.recipe.dense_forward and self.training:
            if sparse or controller.monitor:
                self.state.keep_mask(self.weight, clock.step)
            return DenseGemms(weight), 0
        gemms = self.state.gemms(weight, clock.step, sparse, controller.monitor)
        return gemms, controller.seed(self._place)

    @property
    def quantizers(self) -> OperandQuantizers | None:
        """Of the operands, where the GEMMs are in FP8."""
        owner = self.dense if self.dense is not None else self.state
        return None if owner is None else owner.quantizers

    @property
    def in_fp8_alone(self) -> bool:
        """The layer is its FP8 GEMMs, of whole tiles, and nothing that wants its input in full."""
        observed = self.state is not None and self.state.inputs is not None
        tiles = not any(size % TILE for size in self.shard.local_shape)
        return self.quantizers is not None and not observed and self._branch is None and tiles

    def _multiply(
        self,
        x: torch.Tensor | Float8Input,
        comm: LinearComm,
        bias: torch.Tensor | None = None,
        deferred: Deferred | None = None,
    ) -> torch.Tensor:
        weight = self.scaled_weight()
        gemms, seed = self.current_gemms(weight)
        calibrating = self._controller is not None and self._controller.calibrating
        observed = self.state is not None and self.state.inputs is not None
        # A layer that is recomputed runs twice, without gradients first: it counts once.
        if observed and (calibrating or (self.training and torch.is_grad_enabled())):
            assert self.state is not None and self.state.inputs is not None
            assert isinstance(x, torch.Tensor)  # see in_fp8_alone
            self.state.inputs.observe(x)
        return linear(
            x,
            weight,
            gemms,
            comm,
            seed,
            None if calibrating else self._branch,
            self.slorb_adapter,
            self.slorb_projection,
            bias,
            deferred,
        )

    def bias_of_gemm(self) -> torch.Tensor | None:
        """The bias, where the GEMM adds it: on GPUs, unless the caller does in an activation or the
        GEMM's result is a part of a sum over ranks."""
        fused = self.skip_bias_add and getattr(self.config, "bias_activation_fusion", False)
        return self.bias if self.weight.is_cuda and not fused else None

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """For megatron-core's dist_checkpointing: parameters, mask, scales, FP8 state."""
        return layer_state.sharded(self, prefix, *args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + k: v for k, v in layer_state.export(self).items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        own = layer_state.taken_from(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        layer_state.import_(self, own)

    @property
    def controller(self) -> SparsityController | None:
        """Of the model, once the layer is 2:4 or in FP8."""
        return self._controller

    def extra_repr(self) -> str:
        """One line for `print(model)`, an audit of what is sparse."""
        n, k = self.shard.global_shape
        how = f"{self.state.recipe.name} 2:4" if self.state is not None else "dense"
        if self.quantizers is not None:
            how += " fp8"
        if self.slorb_adapter is not None:
            how += f" + rank {k // self._group_size}"
        return f"in={k}, out={n}, tp={self.shard.world}, {how}"


class SparseColumnParallelLinear(ParallelLinear):
    """`z = x W^T + b` with W split over output features.

    Args: those of megatron-core's ColumnParallelLinear. `stride` is the number of logical matrices
    fused along the output (2 for gate and up); each rank holds a slice of every one.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        gather_output: bool = False,
        stride: int = 1,
        skip_bias_add: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: dist.ProcessGroup | None = None,
        **_: Any,
    ) -> None:
        group = get_tensor_model_parallel_group_if_none(tp_group, is_expert=is_expert)
        shard = WeightShard((output_size, input_size), 0, group.rank(), group.size(), stride)
        super().__init__(config, shard, bias, True, skip_bias_add, group, init_method)
        self.gather_output = gather_output
        self.comm: LinearComm = NoComm()
        if self.sequence_parallel:
            self.comm = GatherOverSequence(group, "input")
        elif group.size() > 1:
            self.comm = SumOverTensorParallel(group)

    def forward(self, x: torch.Tensor | Float8Input) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(S, B, K)` or, with sp, `(S/p, B, K)` -> `(S, B, N/p)` (N with gather_output), bias."""
        added = self.bias_of_gemm()
        z = self._multiply(x, self.comm, added)
        if self.bias is not None and not self.skip_bias_add and added is None:
            z = z + self.bias
        if self.gather_output:
            z = mappings.gather_from_tensor_model_parallel_region(z, group=self.tp_group)
        return z, self.bias if self.skip_bias_add and added is None else None

    def lacking_output(self, x: torch.Tensor | Float8Input) -> tuple[torch.Tensor, Factors | None]:
        """The output for a kernel that applies what it still lacks, and what that is."""
        added, deferred = self.bias_of_gemm(), Deferred()
        takes = not self.gather_output and self.bias is added and self._branch is None
        hooks = (self._forward_hooks, self._forward_pre_hooks)
        if any((*hooks, self._backward_hooks, self._backward_pre_hooks)) or not takes:
            return self(x)[0], None
        return self._multiply(x, self.comm, added, deferred), deferred.factors


class SparseRowParallelLinear(ParallelLinear):
    """`z = x W^T + b` with W split over input features; partial results are summed.

    Args: those of megatron-core's RowParallelLinear; the input must be parallel already.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        stride: int = 1,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: dist.ProcessGroup | None = None,
        **_: Any,
    ) -> None:
        group = get_tensor_model_parallel_group_if_none(tp_group, is_expert=is_expert)
        shard = WeightShard((output_size, input_size), 1, group.rank(), group.size(), stride)
        super().__init__(config, shard, bias, False, skip_bias_add, group, init_method)
        self.input_is_parallel = input_is_parallel
        self.comm = GatherOverSequence(group, "output")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(S, B, K/p)` -> `(S, B, N)` or, with sp, `(S/p, B, N)`, and the bias if skipped."""
        if not self.input_is_parallel:
            x = mappings.scatter_to_tensor_model_parallel_region(x, group=self.tp_group)
        if (added := self.bias_of_gemm()) is not None:
            return self._multiply(x, NoComm(), added), None
        return self.finish(self._multiply(x, NoComm()))

    def bias_of_gemm(self) -> torch.Tensor | None:
        return super().bias_of_gemm() if self.tp_group.size() == 1 else None

    def finish(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's result from this rank's part `(S, B, N)` of the sum `x W^T`."""
        if self.sequence_parallel:
            z = sum_over_sequence(z, self.comm)
        else:
            z = mappings.reduce_from_tensor_model_parallel_region(z, group=self.tp_group)
        if self.bias is not None and not self.skip_bias_add:
            z = z + self.bias
        return z, self.bias if self.skip_bias_add else None
