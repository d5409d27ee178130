"""The parts of a pipeline: what a layer is called with, and which numbers it draws."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.estimate import flops
from megasparse.sparsity.clock import Clock
from tests import dist
from tests.runs import TINY


class _Layer(torch.nn.Module):
    """Stands for a Transformer layer: notes how it is called, and adds numbers that it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def forward(self, hidden_states, attention_mask, rotary_pos_emb):
        self.calls.append((attention_mask, rotary_pos_emb))
        return hidden_states + torch.rand(hidden_states.shape), None


def _part(sequence_parallel=False, world=1, rotary=None, recompute=False, clock=None):
    from megasparse.megatron import pipeline

    config = SimpleNamespace(
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=world,
        context_parallel_size=1,
    )
    layer = _Layer()
    with mock.patch.object(pipeline, "build_module", lambda *_, **__: layer):
        part = pipeline.LayerPart(config, None, 0, rotary, clock or Clock(1, 10), recompute)
    return part, layer


def test_a_layer_gets_the_mask_of_its_micro_batch_and_hands_it_on():
    part, layer = _part()
    hidden = torch.zeros(4, 2, 8)
    assert torch.is_tensor(part(hidden)) and layer.calls == [(None, None)]
    mask = (torch.arange(32).view(2, 1, 4, 4) % 3 == 0).view(torch.uint8)
    _, handed_on = part((hidden, mask))
    assert handed_on is mask
    given = layer.calls[1][0]
    assert given.dtype == torch.bool and torch.equal(given, mask.view(torch.bool))


@pytest.mark.parametrize(("split", "world"), [(False, 2), (True, 2), (True, 4)])
def test_rotary_angles_are_of_the_whole_sequence(split, world):
    part, layer = _part(split, world, rotary=lambda length: length)
    draws = mock.patch("megatron.core.tensor_parallel.get_cuda_rng_tracker")
    with draws:
        part(torch.zeros(6, 1, 4))
    assert layer.calls[0][1] == 6 * (world if split else 1)


def _draws(rank, world, sequence_parallel):
    from megasparse.megatron.grid import make_grid

    make_grid(world, torch.device("cpu"), 3)
    part, _ = _part(sequence_parallel, world)
    zeros = torch.zeros(4, 2, 8)
    return part(zeros), part(zeros)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_differs_by_rank_where_the_sequence_is_split_and_nowhere_else(sequence_parallel):
    """A replicated residual must lose the same entries on all ranks; parts of one must not."""
    (first, later), (other, _) = dist.run(_draws, 2, sequence_parallel)
    assert not torch.equal(first, later)
    assert torch.equal(first, other) != sequence_parallel


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("method", ["none", "uniform", "block"])
def test_layers_that_are_recomputed_are_those_that_are_counted(stages, method):
    from megasparse.megatron.pipeline import recomputed_layers

    flags = [*TINY, "--mock-data", "--num-layers", "6", "--global-batch-size", "12"]
    flags += ["--pipeline-model-parallel-size", str(stages)]
    if method != "none":
        flags += ["--recompute-granularity", "full", "--recompute-method", method]
        flags += ["--recompute-num-layers", "2" if method == "block" else "1"]
    config = resolve(load_config(flags), stages)
    each = 6 // stages
    expected = {
        "none": set(),
        "uniform": set(range(6)),
        "block": {first + n for first in range(0, 6, each) for n in range(2)},
    }[method]
    assert recomputed_layers(config) == expected
    assert flops.layers_recomputed(config.model, config.parallel) == len(expected)


def test_the_loss_is_the_mean_over_tokens_that_count():
    from megasparse.megatron import pipeline

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 7, generator=generator)
    targets = torch.randint(7, (2, 5), generator=generator)
    mask = torch.tensor([[1.0, 1, 0, 0, 1], [0, 0, 1, 0, 0]])

    def entropies(values, labels):  # of one rank: torch's own
        flat = torch.nn.functional.cross_entropy(
            values.flatten(0, 1), labels.flatten(), reduction="none"
        )
        return flat.view(labels.shape)

    with mock.patch.object(pipeline, "token_cross_entropy", entropies):
        found = pipeline.vocab_parallel_loss(logits, (targets, mask))
    each = entropies(logits, targets.t()).t()
    assert float(found) == pytest.approx(float(each[mask.bool()].mean()), rel=1e-6)


def _attention_draws(rank, world, sequence_parallel):
    from megasparse.megatron.blocks.torch_modules import SdpaAttention
    from megasparse.megatron.grid import make_grid

    make_grid(world, torch.device("cpu"), 3)
    torch.manual_seed(1)
    config = SimpleNamespace(
        attention_dropout=0.5,
        sequence_parallel=sequence_parallel,
        window_size=None,
        window_attn_skip_freq=None,
    )
    attention = SdpaAttention(config, 1, None, "self")
    q, k, v = (torch.ones(6, 1, 2, 4) for _ in "qkv")
    drawn = attention(q, k, v, None)
    attention.eval()
    return drawn, attention(q, k, v, None)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_heads_of_other_ranks_lose_other_entries(sequence_parallel):
    """With sequence parallelism the layer sees to that, for all that it draws."""
    (first, kept), (other, also) = dist.run(_attention_draws, 2, sequence_parallel)
    assert torch.equal(kept, torch.ones(6, 1, 8)) and torch.equal(kept, also)
    assert not torch.equal(first, kept)
    assert torch.equal(first, other) == sequence_parallel


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_is_recomputed_in_training_alone_and_never_twice(recompute, training, replayed):
    """Graphs see to it themselves. What is not recomputed is kept, which costs memory, not time."""
    from megasparse.megatron import pipeline

    clock = Clock(1, 10)
    part, layer = _part(recompute=recompute, clock=clock)
    part.train(training)
    runs = []

    def checkpoint(run, distribute, *arguments):
        clock.micro_batch, clock.slot = 3, 1
        output = run(*arguments)
        runs.append((clock.micro_batch, clock.slot))
        clock.micro_batch, clock.slot = 7, 0  # other micro-batches came before the second time
        seen = []
        layer.register_forward_pre_hook(lambda *_: seen.append((clock.micro_batch, clock.slot)))
        run(*arguments)
        runs.extend(seen)
        return output

    clock.micro_batch, clock.slot = 3, 1
    with (
        mock.patch.object(pipeline, "is_replayed", lambda _: replayed),
        mock.patch.object(pipeline.tensor_parallel, "checkpoint", checkpoint),
    ):
        part(torch.zeros(4, 2, 8))
    again = recompute and training and not replayed
    assert runs == ([(3, 1), (3, 1)] if again else [])
    assert len(layer.calls) == (2 if again else 1)
