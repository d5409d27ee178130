"""Places of an expert layer's tokens: those of the whole batch, whichever rank has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.config.batches import expert_segment
from megasparse.errors import ConfigError
from megasparse.megatron.blocks import experts as module
from megasparse.megatron.blocks.experts import (
    ExpertLayer,
    PlacesByAllGather,
    PlacesByAlltoAll,
    finish_expert_layers,
)
from megasparse.megatron.context.chunks import own_chunks
from megasparse.megatron.expert_linear import ExpertLinear
from megasparse.sparsity.gemms.experts import DenseExpertGemms
from megasparse.sparsity.shard import ALL_TOKENS, TokenShare, WeightShard
from tests.megatron.test_sequence_parts import Group

CPU = torch.device("cpu")


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("tp", "split"), [(1, False), (2, False), (2, True), (1, True)])
@pytest.mark.parametrize("cp", [1, 2])
def test_a_token_has_its_place_in_the_batch_of_the_step(monkeypatch, cp, tp, split, second):
    """Sequence by micro-batch, as activations lie."""
    sequence, batch, micro = 64, 3, 5
    whole = torch.arange(sequence * batch).view(sequence, batch)
    clock = SimpleNamespace(micro_batch=micro, batch=12 if second else None)
    controller = SimpleNamespace(clock=clock)
    linears = [SimpleNamespace(controller=None), SimpleNamespace(controller=controller)]
    first, other = linears if second else reversed(linears)
    own = SimpleNamespace(linear_fc1=first, linear_fc2=other)
    for cp_rank in range(cp):
        for rank in range(tp):
            expected = own_chunks(whole, 0, cp_rank, cp)
            if split:
                expected = expected.chunk(tp)[rank]
            share = TokenShare(cp_rank, cp) if cp > 1 else ALL_TOKENS
            monkeypatch.setattr(module, "token_share", lambda _, share=share: share)
            shape = torch.Size((*expected.shape, 8))
            dispatcher = SimpleNamespace(hidden_shape=shape, ep_size=2)
            layer: Any = SimpleNamespace(
                token_dispatcher=dispatcher,
                config=SimpleNamespace(sequence_parallel=split),
                attn_tp_group=Group(rank, tp),
                experts=own,
            )
            places = ExpertLayer._places(layer, CPU)
            assert torch.equal(places, expected.flatten() + micro * sequence * batch)
            assert dispatcher.segment_tokens == expert_segment(sequence) * batch
            of_batch = sequence // expert_segment(sequence)
            assert dispatcher.mixed == 2 * of_batch  # two ranks send an expert their tokens
            assert dispatcher.segments == (12 // batch * of_batch if second else None)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("draws", [(False, False), (True, False), (False, True)])
def test_places_travel_where_somebody_draws(monkeypatch, training, draws):
    monkeypatch.setattr(module.MoELayer, "dispatch", lambda *_: "sent")
    layer = ExpertLayer.__new__(ExpertLayer)
    torch.nn.Module.__init__(layer)
    layer.train(training)
    layer.experts = SimpleNamespace(
        linear_fc1=SimpleNamespace(draws=draws[0]), linear_fc2=SimpleNamespace(draws=draws[1])
    )
    layer.token_dispatcher = SimpleNamespace(places="old", send_places=lambda own: f"sent {own}")
    layer._places = lambda device: "own"
    assert layer.dispatch(torch.zeros(1), torch.zeros(1)) == "sent"
    wanted = training and any(draws)
    assert layer.token_dispatcher.places == ("sent own" if wanted else None)


def _all_gather(tp: int = 1, ep: int = 1) -> Any:
    dispatcher = PlacesByAllGather.__new__(PlacesByAllGather)
    assert dispatcher.places is None and dispatcher.segment_tokens == 1
    dispatcher.tp_size, dispatcher.ep_size, dispatcher.tp_ep_group = tp, ep, "group"
    return dispatcher


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_all_ranks_hear_of_all_places(monkeypatch, tp, ep):
    asked: list[Any] = []

    def gather(own: torch.Tensor, group: Any) -> str:
        asked.append(group)
        return "all"

    monkeypatch.setattr(module, "gather_from_sequence_parallel_region", gather)
    own = torch.arange(4)
    found = _all_gather(tp, ep).send_places(own)
    assert found is own if tp * ep == 1 else found == "all"
    assert asked == ["group"] * (tp * ep > 1)


def test_places_are_sorted_as_the_tokens_of_the_experts_here():
    dispatcher = _all_gather()
    chosen = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]]).bool()
    dispatcher.local_map = chosen  # tokens by experts
    assert dispatcher.sort_places(torch.tensor([5, 6, 7, 8])).tolist() == [5, 6, 6, 7]


def _all_to_all(tp: int = 1) -> Any:
    dispatcher = PlacesByAlltoAll.__new__(PlacesByAlltoAll)
    assert dispatcher.places is None and dispatcher.segment_tokens == 1
    dispatcher.tp_size, dispatcher.tp_rank, dispatcher.tp_group = tp, tp - 1, "tp"
    dispatcher.ep_group = "ep"
    return dispatcher


def _exchanges(monkeypatch) -> list[tuple[Any, ...]]:
    """All-to-alls that leave what they were given."""
    asked: list[tuple[Any, ...]] = []

    def exchange(group: Any, x: torch.Tensor, arriving: Any, leaving: Any) -> torch.Tensor:
        asked.append((group, x.tolist(), arriving, leaving))
        return x

    monkeypatch.setattr(module, "all_to_all", exchange)
    return asked


def test_a_place_goes_where_its_token_goes(monkeypatch):
    asked = _exchanges(monkeypatch)
    dispatcher = _all_to_all()
    dispatcher.routing_map = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    dispatcher.output_splits, dispatcher.input_splits = [3, 1], [2, 2]
    found = dispatcher.send_places(torch.tensor([5, 6, 7]))
    assert found.tolist() == [5, 6, 6, 7]
    assert asked == [("ep", [5, 6, 6, 7], [3, 1], [2, 2])]


def test_tokens_of_tensor_parallel_ranks_are_gathered_whatever_their_number(monkeypatch):
    asked = _exchanges(monkeypatch)
    dispatcher = _all_to_all(2)
    dispatcher.output_splits_tp = torch.tensor([3, 2])
    rows = torch.arange(4.0).view(2, 2)
    assert dispatcher._gather_unequal(rows).tolist() == rows.tolist() * 2
    assert asked[-1][2:] == ([3, 2], [2, 2])
    assert dispatcher._gather_unequal(torch.tensor([7, 8])).tolist() == [7, 8, 7, 8]
    dispatcher.num_local_experts = 1
    assert dispatcher.sort_places(torch.tensor([1, 2])).tolist() == [1, 2, 1, 2]
    # Back: the partial sums of this rank's own tokens, which all ranks have.
    parts = torch.arange(8.0).view(4, 2)
    monkeypatch.setattr(
        module.MoEAlltoAllTokenDispatcher,
        "combine_preprocess",
        lambda self, x: x if self.tp_size == 1 else 1 / 0,
    )
    asked.clear()
    found = dispatcher.combine_preprocess(parts)
    assert torch.equal(found, parts[:2] + parts[2:]) and dispatcher.tp_size == 2
    assert asked == [("tp", parts.tolist(), [2, 2], [3, 2])]


def test_places_are_sorted_by_expert_as_the_tokens_are(monkeypatch):
    dispatcher = _all_to_all()
    dispatcher.num_local_experts = 2
    dispatcher.num_global_tokens_per_local_expert = torch.tensor([[1, 2], [2, 0]])
    dispatcher.sort_input_by_local_experts = torch.tensor([0, 2, 1, 3])
    found = dispatcher.sort_places(torch.tensor([5, 6, 7, 8, 9]))
    assert found.tolist() == [5, 8, 9, 6, 7]  # of two ranks each: 5 | 6 7, then 8 9 |


def test_on_a_cpu_sizes_are_numbers_of_the_host_at_once():
    dispatcher = _all_to_all()
    dispatcher.input_splits, dispatcher.output_splits = torch.tensor([1, 2]), [3, 4]
    dispatcher.output_splits_tp = None
    counts = torch.tensor([5])
    dispatcher.routing_map = torch.ones(1, 1, dtype=torch.bool)
    assert dispatcher._maybe_dtoh_and_synchronize("point", counts) is counts
    assert not torch.is_tensor(dispatcher.input_splits)
    assert dispatcher.input_splits.tolist() == [1, 2] and dispatcher.output_splits == [3, 4]


def test_counts_on_their_way_from_a_gpu_are_waited_for(monkeypatch):
    """They are on the host by then, and may be those of a copy that has not ended."""
    dispatcher, asked = _all_to_all(), []
    dispatcher.routing_map = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(
        module.MoEAlltoAllTokenDispatcher,
        "_maybe_dtoh_and_synchronize",
        lambda self, point, counts=None: asked.append(point) or counts,
    )
    counts = torch.tensor([5])
    assert dispatcher._maybe_dtoh_and_synchronize("before_finish", counts) is counts
    assert asked == ["before_finish"]


def test_only_mixtures_of_our_experts_become_ours(monkeypatch):
    class Mixture(module.MoELayer):  # type: ignore[misc]
        def __init__(self, experts: Any, dispatcher: type) -> None:
            torch.nn.Module.__init__(self)
            self.experts = experts
            self.token_dispatcher = dispatcher.__new__(dispatcher)

    ours = module.Experts.__new__(module.Experts)
    torch.nn.Module.__init__(ours)
    monkeypatch.setattr(module, "MoELayer", Mixture)
    monkeypatch.setattr(module, "ExpertLayer", type("Layer", (Mixture,), {}))
    kinds = (module.MoEAlltoAllTokenDispatcher, module.MoEAllGatherTokenDispatcher)
    model = torch.nn.Sequential(
        Mixture(ours, kinds[0]), Mixture(ours, kinds[1]), Mixture(torch.nn.Linear(1, 1), kinds[0])
    )
    finish_expert_layers(model)
    assert [type(one).__name__ for one in model] == ["Layer", "Layer", "Mixture"]
    assert [type(one.token_dispatcher) for one in model] == [
        PlacesByAlltoAll,
        PlacesByAllGather,
        kinds[0],
    ]
    assert hasattr(module.moe_utils, "te_general_gemm")


@pytest.mark.parametrize("dim", [0, 1])
def test_a_linear_of_experts_knows_its_own_among_all(dim):
    config = SimpleNamespace(
        sequence_parallel=True,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        moe_grouped_gemm=True,
    )
    tp: Any = Group(1, 2)
    ep: Any = Group(1, 4)
    layer: Any = ExpertLinear(config, 8, 12, dim, 2 if dim == 0 else 1, 3, tp, ep)
    assert layer.shard == WeightShard((12 * 12, 8), dim, 1, 2, 6 if dim == 0 else 1, 1, 4)
    assert layer.weight.shape == layer.shard.local_shape and layer.bias is None
    assert (layer.experts, layer.first, layer.total) == (3, 3, 12)
    assert layer.weight.experts_here == 3 and layer.weight.expert_block == (1, 4)
    assert layer.weight.allreduce is False and layer.weight.partition_dim == dim
    assert layer.extra_repr().startswith("3 of 12 experts, in=8, out=144, tp=2, dense")
    assert not layer.draws
    for mvue, draws in (("off", False), ("grad_input", True)):
        layer.state = SimpleNamespace(recipe=SimpleNamespace(mvue=mvue))
        assert layer.draws == draws
    layer.state = None

    def step(calibrating: bool) -> Any:
        begun: list[int] = []
        layer._controller = SimpleNamespace(
            calibrating=calibrating,
            clock=SimpleNamespace(step=7),
            sparse_now=True,
            monitor=False,
            begin_forward=lambda: begun.append(1),
            step_seed=lambda place: 100 + place,
        )
        found = layer._gemms_of_step()
        assert begun == [1]
        return found

    dense = DenseExpertGemms
    assert type(layer._gemms_of_step()[0]) is dense and type(step(False)[0]) is dense
    layer._place = 4
    layer.state = SimpleNamespace(gemms=lambda weight, *how: how)
    assert step(False) == ((7, True, False), 104)
    assert type(step(True)[0]) is dense and step(True)[1] == 0
    layer.dense = SimpleNamespace(gemms=lambda weight, *how: how)
    assert step(False) == ((7,), 0) and type(step(True)[0]) is dense
    with pytest.raises(ConfigError, match="cannot be kept in FP8"):
        layer.freeze_in_fp8()


@pytest.mark.parametrize("tp", [1, 2])
def test_tokens_of_unequal_number_are_exchanged_where_there_are_tensor_parallel_ranks(
    monkeypatch, tp
):
    """megatron-core then sorts them as if there were one rank."""
    asked, dispatcher = _exchanges(monkeypatch), _all_to_all(tp)
    dispatcher.output_splits_tp = torch.tensor([3, 2])
    seen: list[int] = []

    def postprocess(self: Any, tokens: torch.Tensor, probs: torch.Tensor) -> tuple[Any, ...]:
        seen.append(self.tp_size)
        return tokens, probs

    base = module.MoEAlltoAllTokenDispatcher
    monkeypatch.setattr(base, "dispatch_postprocess", postprocess)
    tokens, probs = torch.arange(4.0).view(2, 2), torch.tensor([0.5, 0.25])
    found = dispatcher.dispatch_postprocess(tokens, probs)
    assert [t.tolist() for t in found] == [tokens.tolist() * tp, probs.tolist() * tp]
    assert seen == [1] and dispatcher.tp_size == tp and len(asked) == 2 * (tp - 1)
