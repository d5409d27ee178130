"""Masked decay before or after clipping: what AdamW gets, under every ZeRO stage."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.optim import adamw
from megasparse.sparsity.recipe import make_recipe
from megasparse.train.engine import zero
from tests import dist
from tests.runs import TINY, train


def test_pieces_of_zero_3_lie_after_the_padding_of_those_before():
    """Parts are padded to one length on all ranks; the last rank may hold little, or nothing."""
    sizes, world = (5, 4, 1, 9), 4
    parameters = [torch.nn.Parameter(torch.arange(float(size))) for size in sizes]
    for parameter in parameters:
        parameter.ds_numel = size = parameter.numel()
        parameter.partition_numel = functools.partial(lambda size: -(-size // world), size)
    named = [(str(n), parameter) for n, parameter in enumerate(parameters)]
    for rank in range(world):
        flat = torch.cat([_part_of(parameter, rank, world) for parameter in parameters])
        optimizer = SimpleNamespace(fp32_partitioned_groups_flat=[flat], fp16_groups=[parameters])
        pieces = zero.partition_fragments(named, optimizer, rank)
        for piece in pieces:
            assert piece.tensor is flat
            held = flat[piece.tensor_start : piece.tensor_start + piece.length]
            whole = dict(named)[piece.name]
            assert torch.equal(held, whole[piece.start : piece.start + piece.length])
        held = {piece.name: piece.length for piece in pieces}
        expected = {
            str(n): max(0, min(-(-size // world), size - rank * -(-size // world)))
            for n, size in enumerate(sizes)
        }
        assert held == {name: length for name, length in expected.items() if length}


def _part_of(parameter, rank, world):
    """A rank's part as ZeRO 3 holds it: padded with what is nobody's."""
    length = -(-parameter.numel() // world)
    part = torch.full((length,), -1.0)
    mine = parameter.detach()[rank * length : (rank + 1) * length]
    part[: mine.numel()] = mine
    return part


BEFORE = "--masked-decay-before-clipping"
# A decay as strong as the gradient, so that it counts in the norm.
STRONG = [*TINY, "--train-iters", "4", "--masked-decay", "0.5", "--lr", "1e-2"]
CLIPPED = [*STRONG, "--clip-grad", "0.3"]


def _rows(tmp_path, dataset, name, flags, world=1):
    arguments = [*flags, "--data-path", dataset, "--run-dir", str(tmp_path / name)]
    return dist.run(train, world, arguments)[0]


def _losses(rows):
    return [row["loss"] for row in rows]


def _one_step(rank, world, flags):
    """What updates are called with in the third step, its norm, lambda and the clipping limit."""
    from megasparse.config import load_config, resolve
    from megasparse.megatron.data.batches import batches, build_data
    from megasparse.megatron.grid import make_grid
    from megasparse.sparsity.run_recipe import recipe_of
    from megasparse.train.build import build_engine
    from megasparse.train.engine.deepspeed import start_process

    config = resolve(load_config(flags), world)
    device = start_process(1.0)
    grid = make_grid(1, device, config.train.seed)
    data = build_data(config, grid)
    engine = build_engine(config, grid, recipe_of(config), config.model.vocab_size)
    stream = batches(data.streams["train"], config, grid, 0)
    for _ in range(2):
        engine.train_step(stream)
    found: list[tuple[Any, ...]] = []

    def update(weight, grad, exp_avg, exp_avg_sq, numbers, mask, copy, derived):
        found.append((grad.clone(), weight.clone(), mask, numbers))

    with mock.patch.object(adamw, "masked_adamw_", update):
        result = engine.train_step(stream)
    return found, result.grad_norm, config.sparsity.masked_decay, config.train.clip_grad


@pytest.mark.parametrize("together", [False, True], ids=["after", "before"])
def test_what_adamw_gets(dataset, together):
    flags = [*CLIPPED, "--data-path", dataset, *([BEFORE] if together else [])]
    (found, norm, strength, limit), *_ = dist.run(_one_step, 1, flags)
    assert sum(mask is not None for *_, mask, _ in found) == 4
    decays = [
        torch.zeros_like(weight) if mask is None else strength * ~mask * weight
        for _, weight, mask, _ in found
    ]
    counted = [g + together * decay for (g, *_), decay in zip(found, decays, strict=True)]
    expected = torch.cat(counted).double().norm()
    assert norm == pytest.approx(float(expected), rel=1e-5) and norm > limit
    factor = limit / norm
    for *_, numbers in found:
        assert numbers.clip == pytest.approx(factor, rel=1e-4)
        assert numbers.decay == pytest.approx(strength * (factor if together else 1), rel=1e-4)


def test_without_clipping_they_are_one(tmp_path, dataset):
    for limit in ("0", "1e6"):
        flags = [*STRONG, "--clip-grad", limit]
        after = _rows(tmp_path, dataset, f"after-{limit}", flags)
        before = _rows(tmp_path, dataset, f"before-{limit}", [*flags, BEFORE])
        assert _losses(after) == _losses(before)
        assert all(b["grad_norm"] > a["grad_norm"] for a, b in zip(after, before, strict=True))


def test_every_zero_stage_clips_alike(tmp_path, dataset):
    one = _rows(tmp_path, dataset, "one", [*CLIPPED, BEFORE])
    assert _losses(one) != _losses(_rows(tmp_path, dataset, "after", CLIPPED))
    assert all(row["grad_norm"] > 0.3 for row in one)
    for stage in "0123":
        flags = [*CLIPPED, BEFORE, "--zero-stage", stage]
        two = _rows(tmp_path, dataset, f"zero-{stage}", flags, 2)
        assert _losses(two) == pytest.approx(_losses(one), rel=1e-5), stage
        for a, b in zip(one, two, strict=True):
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4), stage
            if "decay_ratio" in a:
                assert b["decay_ratio"] == pytest.approx(a["decay_ratio"], rel=1e-3), stage
    # In bfloat16 the gradient is rounded, the decay is not; ZeRO's first stage, on one rank.
    rounded = _rows(tmp_path, dataset, "bf16", [*CLIPPED, BEFORE, "--bf16"])
    assert _losses(rounded) == pytest.approx(_losses(one), rel=1e-2)
    assert _losses(rounded) != _losses(one)


def test_recipes_without_such_a_decay_refuse_the_flag():
    for name in ("dense", "ste", "s_ste", "ast"):
        with pytest.raises(ConfigError, match=f"masked_decay_before_clipping: the recipe {name}"):
            make_recipe(name, masked_decay_before_clipping=True)
    assert make_recipe("sr_ste", masked_decay_before_clipping=True).masked_decay == 2e-4
    assert not make_recipe("fst").masked_decay_before_clipping


def _summed(rank, world):
    """Pieces of two replicated parameters and of one that is not, and how many collectives."""
    from megasparse.train.engine.zero import sum_replicated

    calls = []

    def sum_over_tp(tensor):
        calls.append(tensor.numel())
        torch.distributed.all_reduce(tensor)
        return tensor

    replicated, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    replicated.sequence_parallel = True
    flat = torch.arange(12.0) * (rank + 1)
    # A whole gradient, an empty piece, a view into ZeRO's flat tensor.
    pieces = [
        (replicated, flat[:6].view(2, 3)),
        (other, flat[6:8]),
        (replicated, flat[8:8]),
        (replicated, flat[8:]),
    ]
    sum_replicated(pieces, SimpleNamespace(sum_over_tp=sum_over_tp))
    sum_replicated([(other, flat)], SimpleNamespace(sum_over_tp=sum_over_tp))
    return flat, calls


def test_replicated_gradients_are_summed_in_one_collective():
    for rank, (flat, calls) in enumerate(dist.run(_summed, 2)):
        expected = torch.arange(12.0) * 3
        expected[6:8] = torch.arange(6.0, 8.0) * (rank + 1)
        assert torch.equal(flat, expected) and calls == [10]
