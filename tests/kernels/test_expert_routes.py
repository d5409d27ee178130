"""A router's choice as a list, against loops."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels.expert_routes import expert_routes
from tests.kernels.poison import poison_new_tensors

BACKENDS = ["reference", "triton"]


def _map(tokens: int, experts: int, each: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    best = torch.rand(tokens, experts, generator=generator).topk(each, 1).indices
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, best, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "experts", "each"), [(37, 5, 2), (1, 1, 1), (600, 64, 6), (20, 3, 3), (0, 4, 2)]
)
def test_every_choice_is_listed_once(device, monkeypatch, tokens, experts, each, backend):
    routing_map = _map(tokens, experts, each)
    wanted = [(e, t) for e in range(experts) for t in range(tokens) if routing_map[t, e]]
    with monkeypatch.context() as patch:
        poison_new_tensors(patch)
        chosen, of_tokens, parts = expert_routes(routing_map.to(device), each, backend=backend)
    assert chosen.tolist() == [t * experts + e for e, t in wanted]
    assert of_tokens.tolist() == [t for _, t in wanted]
    assert parts.shape == (tokens, each) and parts.dtype == torch.int32
    place = {pair: number for number, pair in enumerate(wanted)}
    for t, found in enumerate(parts.tolist()):
        assert found == [place[e, t] for e in range(experts) if routing_map[t, e]]


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "each"), [(8, 2), (128, 8), (160, 6)])
def test_on_a_gpu_at_the_size_of_a_layer(device, experts, each):
    routing_map = _map(20000, experts, each)
    found = expert_routes(routing_map.to(device), each)
    for ours, theirs in zip(found, expert_routes(routing_map, each), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_refusals():
    for wrong in (torch.zeros(4, 2).int(), torch.zeros(4, 1).bool(), torch.zeros(4).bool()):
        with pytest.raises(KernelError, match="expert_routes: a map of"):
            expert_routes(wrong, 2)
