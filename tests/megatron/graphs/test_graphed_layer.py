"""A layer that may be replayed: when it is, what it has seen, and what hinders a capture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megasparse.megatron.graphs import captured as module
from megasparse.megatron.graphs.captured import (
    GraphedLayer,
    is_replayed,
    let_replays_recompute,
)

ROPE = "rotary_pos_emb"


class Layer(torch.nn.Module):
    """Doubles its input; has a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.nn.Linear(3, 3)
        self.part.bias.requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor, **more: Any) -> tuple[torch.Tensor, Any]:
        return 2 * self.part.weight.sum() * hidden_states, more

    def _forward_attention(self, hidden_states: torch.Tensor, **more: Any) -> Any:
        return hidden_states, "attention"


class Pair:
    """Two graphs, which give the input tenfold."""

    def replay(self, hidden: torch.Tensor) -> torch.Tensor:
        return 10 * hidden


def test_a_layer_is_replayed_in_training_with_gradients_where_graphs_are_in_use():
    layer: Any = Layer()
    graphed, x = GraphedLayer(layer, True), torch.ones(2, 3)
    assert layer.forward is graphed and graphed.recompute and graphed.whole
    assert [p is layer.part.weight for p in graphed.parameters] == [True]
    assert graphed.pair is None and graphed.seen is None and not is_replayed(layer)
    expected = graphed.eager(x)[0]
    for training, gradients, pair in ((False, True, 1), (True, False, 1), (True, True, 0)):
        graphed.pair = Pair() if pair else None  # type: ignore[assignment]
        assert is_replayed(layer) == bool(pair)
        layer.train(training)
        with torch.set_grad_enabled(gradients):
            z, more = layer(hidden_states=x, mask=None, a=1)
        assert torch.equal(z, expected) and more == {"mask": None, "a": 1}
        assert (graphed.seen is None) == bool(pair)
    shape, given = graphed.seen  # type: ignore[misc]
    assert shape.shape == x.shape and shape.device.type == "meta" and given == {"a": 1}
    graphed.pair = Pair()  # type: ignore[assignment]
    z, context = layer(hidden_states=x)
    assert torch.equal(z, 10 * x) and context is None
    assert not is_replayed(Layer())


def test_of_a_layer_with_experts_the_attention_is_replayed(monkeypatch):
    class Mixture(torch.nn.Module): ...

    monkeypatch.setattr(module, "MoELayer", Mixture)
    layer: Any = Layer()
    layer.mlp = Mixture()
    graphed = GraphedLayer(layer, False)
    assert not graphed.whole and not graphed.recompute
    assert layer._forward_attention is graphed and layer.forward is not graphed
    assert graphed.eager(hidden_states=3) == (3, "attention")
    layer.mlp = torch.nn.Identity()
    assert GraphedLayer(layer, False).whole


def _seen(**given: Any) -> GraphedLayer:
    graphed = GraphedLayer(Layer(), False)
    graphed(torch.ones(2, 3), **given)
    return graphed


def test_a_layer_that_was_not_called_cannot_be_captured():
    assert GraphedLayer(Layer(), False).refusal() == "a layer was not called with gradients"


def test_arguments_that_change_are_in_the_way():
    tensor = torch.ones(1)
    for given in ({}, {ROPE: tensor}, {"flag": True, "none": None, ROPE: tensor}):
        assert _seen(**given).refusal() is None
    words = "layers are called with b, mask, which change"
    assert _seen(mask=tensor, b=PackedSeqParams(), **{ROPE: tensor}).refusal() == words


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["forward_pre", "forward", "backward"])
def test_a_hook_of_any_kind_and_module_is_in_the_way(kind, deep):
    graphed = _seen()
    one = graphed.layer.part if deep else graphed.layer  # type: ignore[union-attr]
    names = {"forward_pre": "register_forward_pre_hook", "forward": "register_forward_hook"}
    name = names.get(kind, "register_full_backward_hook")
    handle = getattr(one, name)(lambda *_: None)
    assert graphed.refusal() == "a module of a layer has hooks"
    handle.remove()
    assert graphed.refusal() is None


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_block_leaves_recomputation_to_layers_that_are_replayed(replayed, fails):
    """Its configuration is another meanwhile, and the same again after it."""
    layer = Layer()
    graphed = GraphedLayer(layer, True)
    graphed.pair = Pair() if replayed else None  # type: ignore[assignment]
    config = SimpleNamespace(recompute_granularity="full", other=1)
    seen: list[Any] = []
    block: Any = SimpleNamespace(layers=[layer, None], config=config)

    def forward(*given: Any, **more: Any) -> Any:
        seen.append((block.config.recompute_granularity, block.config.other))
        if fails:
            raise ValueError
        return given, more

    block.forward = forward
    let_replays_recompute(block)
    if fails:
        with pytest.raises(ValueError):
            block.forward(1, a=2)
    else:
        assert block.forward(1, a=2) == ((1,), {"a": 2})
    assert seen == [(None if replayed else "full", 1)]
    assert block.config is config and config.recompute_granularity == "full"


class Rerun:
    """A recorder whose replays compute again, into the tensors of the first time."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.pools, self.left_alone = 0, 0

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def record(self, body: Any, pool: int) -> Any:
        assert pool == self.pools
        places = body()

        def replay() -> None:
            for place, value in zip(places, body(), strict=True):
                assert (place is None) == (value is None)
                if place is not None:
                    place.detach().copy_(value.detach())

        return places, replay

    def leaving_generator(self, replay: Any) -> Any:
        self.left_alone += 1
        return replay


class Tanh(torch.nn.Module):
    """A layer with a weight that is trained, one that is frozen, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3))
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.randn(2))

    def forward(self, hidden_states: torch.Tensor, **more: Any) -> tuple[torch.Tensor, None]:
        turned = hidden_states @ self.weight + self.frozen
        return torch.tanh(turned if not more else turned * more[ROPE]), None


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("recompute", [(False, False), (True, False), (True, True)])
def test_replays_are_the_layers_step_after_step(recompute, added, constant):
    """Output and gradients, which leave the graphs or are added up; nothing of a layer changes."""
    torch.manual_seed(0)
    layers = [Tanh(), Tanh()]
    given = {ROPE: torch.tensor(0.5)} if constant else {}

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(hidden_states=x, **given)[0]
        return x

    steps = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(3)]
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    expected = []
    for x, dz in steps:
        leaf = x.clone().requires_grad_()
        z = run(leaf)
        found = torch.autograd.grad(z, [leaf, *trained], dz, allow_unused=True)
        expected.append((z.detach(), *found))
    graphed = [GraphedLayer(layer, r) for layer, r in zip(layers, recompute, strict=True)]
    run(torch.zeros(4, 3))  # what they have to have seen
    recorder: Any = Rerun()
    sums = {p: torch.zeros_like(p, requires_grad=False) for p in trained} if added else None
    passes: list[int] = []
    own = [dict(layer.named_parameters()) for layer in layers]
    graphs = module.GraphSet(graphed, sums, recorder, captured=lambda: passes.append(1))
    assert len(passes) == 4 and recorder.left_alone == sum(recompute)
    for layer, names in zip(layers, own, strict=True):
        assert all(p is names[name] for name, p in layer.named_parameters())
    for one, pair in zip(graphed, graphs.pairs, strict=True):
        one.pair = pair
    for total in (sums or {}).values():
        total.zero_()
    for step, (x, dz) in enumerate(steps):
        leaf = x.clone().requires_grad_()
        z = run(leaf)
        z.backward(dz)
        torch.testing.assert_close(z, expected[step][0])
        torch.testing.assert_close(leaf.grad, expected[step][1])
        for place, parameter in enumerate(trained, 2):
            whole = expected[step][place]
            if added:
                assert sums is not None and parameter.grad is None
                before = [one[place] for one in expected[: step + 1]]
                wanted = torch.zeros_like(parameter) if whole is None else sum(before)
                torch.testing.assert_close(sums[parameter], wanted)
            else:
                assert (parameter.grad is None) == (whole is None)
                if whole is not None:
                    torch.testing.assert_close(parameter.grad, whole)
                parameter.grad = None
