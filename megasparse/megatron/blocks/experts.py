"""Mixture-of-experts layers: megatron-core's router and dispatchers around experts of this package.

    router      logits of every token for every expert; the top k compute it
    dispatcher  brings each token to the ranks of its experts, and takes the results back
    experts     two linears and an activation, for all experts of the rank at once

A token's place in the batch travels with it where MVUE draws: megatron-core's dispatchers forget
where tokens came from, and draws must not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from megasparse.config.batches import expert_segment
from megasparse.kernels import Routes, expert_routes
from megasparse.megatron.blocks.torch_modules import GatedActivation
from megasparse.megatron.context.share import token_share
from megasparse.megatron.expert_linear import ExpertLinear
from megasparse.sparsity.autograd.experts import (
    expert_feed_forward,
    rows_of_tokens,
    rows_of_weights,
    tokens_of_rows,
)
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.gemms.expert_tokens import Arrivals


class Experts(torch.nn.Module):
    """The experts of this rank: `fc2(probability * activation(fc1(x)))` each.

    Args: those that megatron-core's MoELayer gives; newer versions give a name.
    """

    def __init__(
        self, num_local_experts: int, config: Any, pg_collection: Any, name: str | None = None
    ) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        gated = 2 if config.gated_linear_unit else 1
        groups = (pg_collection.expt_tp, pg_collection.ep)
        self.linear_fc1 = ExpertLinear(
            config, hidden, gated * width, 0, gated, num_local_experts, *groups
        )
        self.linear_fc2 = ExpertLinear(config, width, hidden, 1, 1, num_local_experts, *groups)
        self.activation: Callable[[torch.Tensor], torch.Tensor] = (
            GatedActivation(config) if config.gated_linear_unit else config.activation_func
        )

    def forward(
        self, x: torch.Tensor, probabilities: torch.Tensor, arrivals: Arrivals
    ) -> torch.Tensor:
        """`(T, H)`, sorted by expert, and `(T,)` -> `(T, H)`, a partial sum over TP; tokens with
        routes once each, and a probability for each of their experts."""
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        first, second = fc1.current_gemms(), fc2.current_gemms()
        both: Any = (first[0], second[0])
        tile, draws = max(one.tile for one in both), any(one.draws for one in both)
        tokens = arrivals.in_tiles(tile, draws and self.training, x.device)
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in (fc1, fc2))
        if isinstance(self.activation, GatedActivation) and not watched:
            return expert_feed_forward(
                x,
                probabilities,
                (fc1.weight, fc2.weight),
                both,
                tokens,
                (first[1], second[1]),
                "geglu" if self.activation.gelu else "swiglu",
            )
        x, probabilities = rows_of_tokens(x, tokens), rows_of_weights(probabilities, tokens)
        y = self.activation(self.linear_fc1(x, tokens, first))
        weighted = (y * probabilities.unsqueeze(-1)).to(y.dtype)
        return tokens_of_rows(self.linear_fc2(weighted, tokens, second), tokens)


class ExpertLayer(MoELayer):
    """megatron-core's layer, whose experts know which tokens have come to them."""

    def dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Also sends the tokens' places, if they are wanted."""
        dispatcher: Any = self.token_dispatcher
        sent = super().dispatch(hidden_states, probs)
        fc1 = self.experts.linear_fc1
        wanted = fc1.draws or self.experts.linear_fc2.draws
        dispatcher.places = None
        if wanted and self.training:
            dispatcher.places = dispatcher.send_places(self._places(hidden_states.device))
        return sent

    def _places(self, device: torch.device) -> torch.Tensor:
        """Of this rank's tokens `(T,)`, in the batch of the step."""
        dispatcher, share = self.token_dispatcher, token_share(self.config)
        sequence, batch = dispatcher.hidden_shape[:2]
        split = self.config.sequence_parallel and self.attn_tp_group.size() or 1
        rank = self.attn_tp_group.rank() if split > 1 else 0
        local, sequence = sequence * batch, sequence * split * share.size
        # Of what tensor-parallel ranks share; context parallelism makes two runs of it.
        own = torch.arange(rank * local, (rank + 1) * local, device=device)
        (_, place), (start, second) = (runs := share.places(local * split))[0], runs[-1]
        if share.size > 1:
            own = torch.where(own < start, own + place, own + (second - start))
        clock, of_batch = _clock(self.experts), sequence // expert_segment(sequence)
        dispatcher.segment_tokens = expert_segment(sequence) * batch
        dispatcher.mixed = of_batch * dispatcher.ep_size
        # Outside a run nobody says how many micro-batches a step has.
        dispatcher.segments = clock.batch // batch * of_batch if clock.batch else None
        return own + clock.micro_batch * sequence * batch

    def routed_experts_compute(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """The experts' results `(T, H)`, in the order in which tokens go back."""
        dispatcher: Any = self.token_dispatcher
        x, counts, probabilities = dispatcher.dispatch_postprocess(hidden_states, probs)
        places = dispatcher.places
        fc1 = self.experts.linear_fc1
        arrivals = Arrivals(
            counts.tolist(),
            None if places is None else dispatcher.sort_places(places),
            dispatcher.segment_tokens,
            fc1.first,
            fc1.total,
            dispatcher.segments,
            dispatcher.mixed,
            dispatcher.ep_size * dispatcher.tp_size == 1,
            dispatcher.routes,
        )
        output = self.experts(x, probabilities, arrivals)
        return dispatcher.combine_preprocess(output), None


def _clock(experts: Experts) -> Clock:
    controller = experts.linear_fc1.controller or experts.linear_fc2.controller
    assert controller is not None
    clock: Clock = controller.clock
    return clock


class PlacesByAlltoAll(MoEAlltoAllTokenDispatcher):
    """Each rank sends a token, and its place, to the ranks of its experts.

    Attributes:
        places: int64, of the tokens that have come; None: they were not sent.
        segment_tokens: of those that are grouped for MVUE.
        segments, mixed, routes: see `Arrivals`.
    """

    tp_size: int
    places: torch.Tensor | None = None
    segment_tokens: int = 1
    segments: int | None = None
    mixed: int | None = None
    routes: Routes | None = None

    @property
    def stays(self) -> bool:
        """Whether all experts are here, and tokens with them: nothing is sent, sorted or copied,
        and the experts find each token where it is."""
        elsewhere = self.ep_size * self.tp_size > 1 or self.shared_experts is not None
        padded = self.drop_and_pad or self.config.moe_router_padding_for_quantization
        return not (elsewhere or padded or self.config.moe_expert_capacity_factor is not None)

    def dispatch_preprocess(self, hidden_states: Any, routing_map: Any, probs: Any) -> Any:
        """The tokens themselves, and the probability of each of their parts, by expert."""
        self.routes = None
        if not self.stays:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape = hidden_states.shape
        self.probs, self.routing_map = probs, routing_map
        counts = self.preprocess(routing_map)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", counts)
        self.routes = expert_routes(routing_map, self.config.moe_router_topk)
        chosen = probs.reshape(-1).index_select(0, self.routes.chosen)
        return hidden_states.reshape(-1, hidden_states.shape[-1]), chosen

    def token_dispatch(self, *sent: Any) -> Any:
        """Nothing where they stay."""
        return sent if self.routes is not None else super().token_dispatch(*sent)

    def token_combine(self, hidden_states: Any, *rest: Any, **more: Any) -> Any:
        """The reverse."""
        if self.routes is not None:
            return hidden_states
        return super().token_combine(hidden_states, *rest, **more)

    def combine_postprocess(self, hidden_states: Any) -> Any:
        """Results in the shape of the layer's input."""
        if self.routes is None:
            return super().combine_postprocess(hidden_states)
        self.routes = None
        return hidden_states.view(self.hidden_shape)

    def send_places(self, own: torch.Tensor) -> torch.Tensor:
        """Of this rank's tokens `(T,)`, to where the tokens went."""
        if self.routes is not None:
            return own.index_select(0, self.routes.tokens)
        chosen = self.routing_map.t().contiguous()
        leaving = own.expand(chosen.shape).masked_select(chosen)
        return all_to_all(self.ep_group, leaving, self.output_splits, self.input_splits)

    def sort_places(self, places: torch.Tensor) -> torch.Tensor:
        """By expert, as `dispatch_postprocess` does with the tokens."""
        if self.routes is not None:
            return places
        if self.tp_size > 1:
            places = self._gather_unequal(places)
        if self.num_local_experts == 1:
            return places
        sizes, order = self.num_global_tokens_per_local_expert, self.sort_input_by_local_experts
        by_expert: torch.Tensor = moe_utils.sort_chunks_by_idxs(places, sizes.ravel(), order)[0]
        return by_expert

    def dispatch_postprocess(self, global_input_tokens: Any, global_probs: Any) -> Any:
        """On a CPU the tensor-parallel ranks' tokens, of unequal number, are exchanged: gloo
        gathers equal parts alone."""
        whole = self.tp_size
        if self.routes is not None:
            counts: Any = self.tokens_per_expert
            for point in ("before_ep_alltoall", "before_permutation_2", "before_finish"):
                counts = self._maybe_dtoh_and_synchronize(point, counts)
            return global_input_tokens, counts, global_probs
        if whole == 1 or global_input_tokens.is_cuda:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        tokens, probs = map(self._gather_unequal, (global_input_tokens, global_probs))
        self.tp_size = 1
        try:
            return super().dispatch_postprocess(tokens, probs)
        finally:
            self.tp_size = whole

    def combine_preprocess(self, hidden_states: Any) -> Any:
        """The reverse."""
        whole = self.tp_size
        if self.routes is not None:
            return hidden_states
        if whole == 1 or hidden_states.is_cuda:
            return super().combine_preprocess(hidden_states)
        self.tp_size = 1
        try:
            sorted_back = super().combine_preprocess(hidden_states)
        finally:
            self.tp_size = whole
        sizes = self.output_splits_tp.tolist()
        own = [sizes[self.tp_rank]] * whole
        parts = all_to_all(self.tp_group, sorted_back, own, sizes)
        return parts.view(whole, own[0], parts.shape[1]).sum(0)

    def _gather_unequal(self, own: torch.Tensor) -> torch.Tensor:
        """All tensor-parallel ranks' rows; the gradient is summed over them."""
        sizes = self.output_splits_tp.tolist()
        copies = own.repeat(self.tp_size, *[1] * (own.dim() - 1))
        return all_to_all(self.tp_group, copies, sizes, [len(own)] * self.tp_size)

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor:
        """On a CPU nothing has to be waited for; sizes become numbers of the host all the same."""
        # Counts on the host may be those of a copy from the device that is under way.
        if tokens_per_expert is None or self.routing_map.is_cuda:
            return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            sizes = getattr(self, name)
            if torch.is_tensor(sizes):
                setattr(self, name, sizes.numpy())
        return tokens_per_expert


class PlacesByAllGather(MoEAllGatherTokenDispatcher):
    """All ranks get all tokens, with their places.

    Attributes: as above.
    """

    places: torch.Tensor | None = None
    segment_tokens: int = 1
    segments: int | None = None
    mixed: int | None = None
    routes: Routes | None = None

    def send_places(self, own: torch.Tensor) -> torch.Tensor:
        """Of this rank's tokens `(T,)`, to all ranks."""
        if self.tp_size * self.ep_size == 1:
            return own
        return gather_from_sequence_parallel_region(own, group=self.tp_ep_group)

    def sort_places(self, places: torch.Tensor) -> torch.Tensor:
        """Those of this rank's experts, by expert."""
        chosen = self.local_map.t().contiguous()
        return places.expand(chosen.shape).masked_select(chosen)


def finish_expert_layers(model: torch.nn.Module) -> None:
    """Make `ExpertLayer`s of the mixtures of a model that was built, dispatchers included.

    Their classes change and nothing else: a Transformer layer gives its process groups to no other
    class than MoELayer itself, and that chooses its dispatcher by the configuration.
    """
    dispatchers: dict[type, Any] = {
        MoEAlltoAllTokenDispatcher: PlacesByAlltoAll,
        MoEAllGatherTokenDispatcher: PlacesByAllGather,
    }
    for module in model.modules():
        if type(module) is MoELayer and isinstance(module.experts, Experts):
            module.__class__ = ExpertLayer
            dispatcher = module.token_dispatcher
            dispatcher.__class__ = dispatchers[type(dispatcher)]
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # without Transformer Engine its router asks for it


def expert_layer_spec(provider: Any) -> ModuleSpec:
    """A mixture of experts from the provider's classes; shared experts are plain FFNs."""
    linears = MLPSubmodules(
        linear_fc1=provider.column_parallel_linear(),
        linear_fc2=provider.row_parallel_linear(),
        activation_func=provider.activation_func(),
    )
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=Experts),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears),
        ),
    )
