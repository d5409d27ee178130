"""When a layer is replayed, when it runs as it is, and why one cannot be captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megasparse.megatron.graphs.captured import GraphedLayer, is_replayed, let_replays_recompute


class _Layer(torch.nn.Module):
    """Doubles its input; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.given: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, None]:
        self.given = given
        return 2 * hidden_states, None


class _Pair:
    def replay(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 100


def _called(**given: Any) -> GraphedLayer:
    graphed = GraphedLayer(_Layer(), recompute=False)
    graphed.layer(torch.ones(3, 2), **given)
    return graphed


def test_a_layer_is_replayed_while_it_trains_and_has_graphs():
    graphed, x = _called(), torch.ones(3, 2)
    layer = graphed.layer
    assert not is_replayed(layer) and torch.equal(layer(x)[0], 2 * x)
    graphed.pair = _Pair()  # type: ignore[assignment]
    assert is_replayed(layer) and torch.equal(layer(x)[0], x + 100)
    with torch.no_grad():
        assert torch.equal(layer(x)[0], 2 * x)
    layer.eval()
    assert torch.equal(layer(x)[0], 2 * x)


def test_only_calls_with_gradients_are_seen():
    graphed = GraphedLayer(_Layer(), recompute=False)
    with torch.no_grad():
        graphed.layer(torch.ones(3, 2))
    assert graphed.seen is None and graphed.refusal() == "a layer was not called with gradients"
    graphed.layer(torch.ones(3, 2), attention_mask=None, rotary_pos_emb=torch.ones(1))
    hidden, given = graphed.seen
    assert hidden.shape == (3, 2) and hidden.is_meta and list(given) == ["rotary_pos_emb"]
    assert graphed.layer.given.keys() == {"attention_mask", "rotary_pos_emb"}
    names = {id(p): n for n, p in graphed.layer.named_parameters()}
    assert [names[id(p)] for p in graphed.parameters] == ["inner.weight", "inner.bias"]


def test_other_tensors_cannot_be_arguments():
    assert _called(rotary_pos_emb=torch.ones(1), number=3).refusal() is None
    mask, context = torch.ones(1), torch.ones(1)
    found = _called(rotary_pos_emb=mask, context=context, attention_mask=mask).refusal()
    assert found == "layers are called with attention_mask, context, which change"


@pytest.mark.parametrize("whose", ["layer", "inner"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_of_any_kind_and_module_are_a_reason(register, whose):
    graphed = _called()
    module = graphed.layer if whose == "layer" else graphed.layer.inner
    handle = getattr(module, register)(lambda *_: None)
    assert graphed.refusal() == "a module of a layer has hooks"
    handle.remove()
    assert graphed.refusal() is None


def test_a_block_leaves_recomputation_to_layers_that_are_replayed():
    class Config:
        recompute_granularity = "full"

    class Block:
        def __init__(self) -> None:
            self.config, self.layers, self.fails = Config(), [graphed.layer], False

        def forward(self) -> Any:
            if self.fails:
                raise ValueError("of the block")
            return self.config.recompute_granularity

    graphed = _called()
    block = Block()
    whole = block.config
    let_replays_recompute(block)
    assert block.forward() == "full"
    graphed.pair = _Pair()  # type: ignore[assignment]
    assert block.forward() is None
    assert block.config is whole and whole.recompute_granularity == "full"
    block.fails = True
    with pytest.raises(ValueError, match="of the block"):
        block.forward()
    assert block.config is whole
