"""Experts by their definition, whichever way they are computed; and which way that is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

from megasparse.kernels import expert_routes
from megasparse.megatron.blocks import experts as module
from megasparse.megatron.blocks.experts import Experts, PlacesByAlltoAll
from megasparse.sparsity.gemms.expert_tokens import Arrivals
from tests.megatron.test_sequence_parts import Group

E, H, F = 3, 8, 12
# Of each activation: torch's function in the configuration, and what it computes of `(T, width)`.
UNGATED = {"relu": relu, "gelu": gelu}
GATED = {
    "swiglu": (silu, lambda y: silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1]),
    "geglu": (gelu, lambda y: gelu(y.chunk(2, -1)[0], approximate="tanh") * y.chunk(2, -1)[1]),
}


def _experts(activation: str) -> tuple[Experts, Any]:
    gated = activation in GATED
    function, computed = GATED[activation] if gated else (UNGATED[activation],) * 2
    config = SimpleNamespace(
        hidden_size=H,
        moe_ffn_hidden_size=F,
        gated_linear_unit=gated,
        activation_func=function,
        sequence_parallel=False,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        moe_grouped_gemm=False,
    )
    experts = Experts(E, config, SimpleNamespace(expt_tp=Group(0, 1), ep=Group(0, 1)))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return experts, computed


def _by_definition(experts: Experts, computed: Any, x: Any, p: Any, counts: list[int]) -> Any:
    w1, w2 = experts.linear_fc1.weight.chunk(E), experts.linear_fc2.weight.chunk(E)
    parts = zip(x.split(counts), p.split(counts), w1, w2, strict=True)
    return torch.cat([q[:, None] * computed(t @ a.t()) @ b.t() for t, q, a, b in parts])


COUNTS = [3, 0, 4]


@pytest.mark.parametrize("hook", [None, "fc1 before", "fc1 after", "fc2 before", "fc2 after"])
@pytest.mark.parametrize("activation", [*GATED, *UNGATED])
def test_experts_are_their_definition_and_hooks_see_their_linears(monkeypatch, activation, hook):
    experts, computed = _experts(activation)
    at_once, seen = [], []
    whole = module.expert_feed_forward
    monkeypatch.setattr(
        module, "expert_feed_forward", lambda *a: at_once.append(a[-1]) or whole(*a)
    )
    if hook is not None:
        linear = experts.linear_fc1 if "fc1" in hook else experts.linear_fc2
        if "before" in hook:
            linear.register_forward_pre_hook(lambda m, given: seen.append(given[0].shape))
        else:
            linear.register_forward_hook(lambda m, given, z: seen.append(given[0].shape))
    x, p = torch.randn(sum(COUNTS), H).requires_grad_(), torch.rand(sum(COUNTS)).requires_grad_()
    dz = torch.randn(sum(COUNTS), H)
    z = experts(x, p, Arrivals(COUNTS))
    expected = _by_definition(experts, computed, x, p, COUNTS)
    torch.testing.assert_close(z, expected)
    given = (x, p, *experts.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(z, given, dz), torch.autograd.grad(expected, given, dz), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if hook is None:  # the parts together, where there is a function for them
        assert at_once == ([activation] if activation in GATED else [])
    else:
        assert at_once == [] and seen == [(sum(COUNTS), H if "fc1" in hook else F)]


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_tokens_with_routes_are_there_once(activation):
    """And come back once, summed over their experts."""
    experts, computed = _experts(activation)
    chosen = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()
    x, weights = torch.randn(4, H), torch.rand(4, E)
    routes = expert_routes(chosen, 2)
    p = weights.reshape(-1).index_select(0, routes.chosen)
    z = experts(x, p, Arrivals(chosen.sum(0).tolist(), routes=routes))
    expected = torch.zeros(4, H)
    for number in range(E):
        rows = chosen[:, number].nonzero()[:, 0]
        w1, w2 = (one.weight.chunk(E)[number] for one in (experts.linear_fc1, experts.linear_fc2))
        y = weights[rows, number, None] * computed(x[rows] @ w1.t()) @ w2.t()
        expected.index_add_(0, rows, y)
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_experts_have_the_sizes_of_the_configuration(activation):
    experts, _ = _experts(activation)
    gated = 2 if activation in GATED else 1
    fc1, fc2 = experts.linear_fc1, experts.linear_fc2
    assert fc1.weight.shape == (E * gated * F, H) and fc2.weight.shape == (E * H, F)
    assert (fc1.shard.dim, fc1.shard.parts) == (0, gated * E)
    assert (fc2.shard.dim, fc2.shard.parts) == (1, 1)


def _dispatcher(**changes: Any) -> Any:
    """All experts here, one rank, nothing dropped or padded."""
    config = SimpleNamespace(
        moe_router_padding_for_quantization=False,
        moe_expert_capacity_factor=None,
        moe_router_topk=1,
    )
    one = PlacesByAlltoAll.__new__(PlacesByAlltoAll)
    state = {"ep_size": 1, "tp_size": 1, "shared_experts": None, "drop_and_pad": False}
    one.__dict__.update(state | {"config": config})
    for name, value in changes.items():
        setattr(one if name in state else config, name, value)
    return one


def test_tokens_stay_where_nothing_has_to_be_sent_dropped_or_padded():
    assert _dispatcher().stays
    for change in (
        {"ep_size": 2},
        {"tp_size": 2},
        {"shared_experts": "an FFN"},
        {"drop_and_pad": True},
        {"moe_router_padding_for_quantization": True},
        {"moe_expert_capacity_factor": 1.25},
    ):
        assert not _dispatcher(**change).stays, change


def test_tokens_that_stay_come_to_the_experts_as_they_are_and_go_back_in_their_shape():
    dispatcher = _dispatcher(moe_router_topk=2)
    chosen = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]).bool()
    probs, hidden = torch.rand(4, E) * chosen, torch.randn(2, 2, H)
    dispatcher.num_local_experts = E
    dispatcher.input_splits = dispatcher.output_splits = dispatcher.output_splits_tp = None
    dispatcher.preprocess = lambda map_TE: map_TE.sum(0)
    dispatcher.routing_map = chosen
    tokens, p = dispatcher.dispatch_preprocess(hidden, chosen, probs)
    assert torch.equal(tokens, hidden.view(4, H))
    by_expert = [probs[chosen[:, e], e] for e in range(E)]
    assert torch.equal(p, torch.cat(by_expert))
    assert dispatcher.token_dispatch(tokens, p) == (tokens, p)
    own = torch.arange(4)
    places = dispatcher.send_places(own)
    assert places.tolist() == [n for e in range(E) for n in own[chosen[:, e]].tolist()]
    assert dispatcher.sort_places(places) is places
    found, counts, q = dispatcher.dispatch_postprocess(tokens, p)
    assert found is tokens and counts.tolist() == [3, 3, 2] and q is p
    assert dispatcher.combine_preprocess(tokens) is tokens
    assert dispatcher.token_combine(tokens) is tokens
    assert dispatcher.routes is not None
    back = dispatcher.combine_postprocess(tokens)
    assert back.shape == hidden.shape and dispatcher.routes is None


def test_tokens_that_do_not_stay_are_megatrons_to_send(monkeypatch):
    base = module.MoEAlltoAllTokenDispatcher
    for name in ("dispatch_preprocess", "token_dispatch", "token_combine", "combine_postprocess"):
        monkeypatch.setattr(base, name, lambda self, *a, name=name, **k: (name, a, k))
    dispatcher = _dispatcher(ep_size=2)
    dispatcher.routes = "old"
    assert dispatcher.dispatch_preprocess(1, 2, 3) == ("dispatch_preprocess", (1, 2, 3), {})
    assert dispatcher.routes is None
    assert dispatcher.token_dispatch(1, 2) == ("token_dispatch", (1, 2), {})
    assert dispatcher.token_combine(1, 2, a=3) == ("token_combine", (1, 2), {"a": 3})
    assert dispatcher.combine_postprocess(1) == ("combine_postprocess", (1,), {})
