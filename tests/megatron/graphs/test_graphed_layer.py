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
