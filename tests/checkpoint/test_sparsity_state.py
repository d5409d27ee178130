"""Where the parts of a sparsity state lie in a checkpoint, for the shards of any layout."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.checkpoint import sparsity_state as module
from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.stored_mask import mask_part
from megasparse.config.batches import DEFAULT_ITERS
from megasparse.errors import CheckpointError
from megasparse.kernels import is_24
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from tests.checkpoint.test_stored_model import FC1, FC2, S_STE, STE, Reader


class Kept:
    """A checkpoint of one weight's state, in memory."""

    folder = "there"

    def __init__(self, name: str, **tensors: torch.Tensor) -> None:
        self.tensors = {f"sparsity/{name}/{kind}": value for kind, value in tensors.items()}

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def keys_beside(self, key: str, prefix: str) -> list[str]:
        assert key.endswith("/counters")
        return [other for other in self.tensors if other.startswith(prefix)]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def read_part(self, wanted: Piece) -> torch.Tensor:
        return wanted.shard.slice_of(self.tensors[wanted.key]).reshape(-1)


COUNTERS = torch.tensor([4, 2])


def _state(shard: WeightShard, experts: int | None = None) -> SparseWeight:
    return SparseWeight("w", make_recipe("fst"), shard, experts=experts)


@pytest.mark.parametrize(("dim", "parts"), [(0, 1), (0, 2), (1, 1), (None, 1)])
@pytest.mark.parametrize("transposable", [False, True])
def test_a_mask_is_cut_as_its_weight_in_groups_or_in_blocks(dim, parts, transposable):
    world = 1 if dim is None else 2
    height = 4 if transposable else 1
    mask = torch.arange(16 // height * 8, dtype=torch.uint8).view(16 // height, 8)
    reader: Any = Kept("w", counters=COUNTERS, mask=mask)
    rows = torch.arange(16)[:, None].expand(16, 32)
    columns = torch.arange(32)[None].expand(16, 32)
    for rank in range(world):
        shard = WeightShard((16, 32), dim, rank, world, parts)
        loaded = module.sparsity_state(reader, _state(shard))
        assert loaded["counters"].tolist() == [4, 2]
        whole = mask.repeat_interleave(height, 0).repeat_interleave(4, 1)
        own = shard.slice_of(whole)[::height, ::4]
        assert torch.equal(loaded["mask"], own)
        assert own.shape == (
            shard.slice_of(rows).shape[0] // height,
            shard.slice_of(columns).shape[1] // 4,
        )


def test_scales_are_of_the_experts_here_and_otherwise_whole():
    scale = torch.arange(8.0)
    reader: Any = Kept("w", counters=COUNTERS, scale=scale)
    for block in range(2):
        shard = WeightShard((8 * 16, 32), 0, 1, 2, 4, block, 2)
        loaded = module.sparsity_state(reader, _state(shard, 4))
        assert loaded["scale"].tolist() == scale[4 * block : 4 * block + 4].tolist()
    single: Any = Kept("w", counters=COUNTERS, scale=torch.tensor(2.0))
    loaded = module.sparsity_state(single, _state(WeightShard((16, 32), 0, 1, 2)))
    assert loaded["scale"].shape == () and float(loaded["scale"]) == 2.0


@pytest.mark.parametrize(("dim", "cut"), [(0, False), (1, True), (None, False)])
def test_norms_of_inputs_are_cut_where_the_inputs_are(dim, cut):
    square = torch.arange(32.0)
    reader: Any = Kept("w", counters=COUNTERS, input_square=square, other=square)
    shard = WeightShard((16, 32), dim, 1 if dim is not None else 0, 2 if dim is not None else 1)
    loaded = module.sparsity_state(reader, _state(shard))
    assert torch.equal(loaded["input_square"], square[16:] if cut else square)
    assert torch.equal(loaded["other"], square)


def test_a_weight_without_counters_has_no_state():
    reader: Any = Kept("w", mask=COUNTERS)
    with pytest.raises(CheckpointError, match="holds no sparsity state of w"):
        module.sparsity_state(reader, _state(WeightShard((16, 32))))


@pytest.mark.parametrize("blocks", [1, 2])
def test_flips_go_to_the_rank_that_counted_them_or_all_to_the_first(blocks):
    world = 2 * blocks
    flips = torch.arange(1, world + 1)
    for block in range(blocks):
        for rank in range(2):
            shard = WeightShard((32, 32), 0, rank, 2, 1, block, blocks)
            number = 2 * block + rank
            assert module.flips_shard(shard) == WeightShard((world,), 0, number, world)
            own = module.own_flips({"flips": flips, "mask": COUNTERS}, shard)
            assert int(own["flips"]) == number + 1 and own["mask"] is COUNTERS
            other = module.own_flips({"flips": torch.tensor([5, 6, 7, 8, 9])}, shard)["flips"]
            assert other.shape == () and int(other) == (35 if number == 0 else 0)
            assert module.own_flips({"mask": COUNTERS}, shard) == {"mask": COUNTERS}


@pytest.mark.parametrize(("said", "expected"), [(7, 7), (None, DEFAULT_ITERS), (1, 1)])
def test_a_run_without_a_length_has_the_default(said, expected):
    reader: Any = SimpleNamespace(meta={"config": {"train": {"train_iters": said}}})
    assert module.run_length(reader) == expected


def test_experts_are_known_by_their_names():
    reader: Any = SimpleNamespace(meta={"config": {"model": {"num_experts": 8}}})
    assert module.stacked_experts(reader, "a.mlp.experts.linear_fc1.weight") == 8
    assert module.stacked_experts(reader, "a.mlp.shared_experts.linear_fc1.weight") is None
    reader.meta["config"]["model"] = {}
    assert module.stacked_experts(reader, "a.mlp.experts.linear_fc1.weight") is None


def test_the_mask_of_a_part_is_the_part_of_the_mask():
    for flags in ((), STE):
        reader: Any = Reader(*flags)
        recipe = recipe_of(reader.config)
        for name, dim, parts in ((FC1, 0, 2), (FC2, 1, 1)):
            shape = reader.shape(f"param/{name}")
            whole = mask_part(reader, name, recipe, WeightShard(shape))
            assert whole is not None and is_24(whole.float()) and whole.float().mean() == 0.5
            for rank in range(2):
                shard = WeightShard(shape, dim, rank, 2, parts)
                own = mask_part(reader, name, recipe, shard)
                assert own is not None and torch.equal(own, shard.slice_of(whole))
        without = dataclasses.replace(recipe_of(reader.config))
        del reader.tensors[f"sparsity/{FC1}/mask"]
        assert mask_part(reader, FC1, without, WeightShard(shape)) is None
    s_ste: Any = Reader("--sparsity-recipe", "s_ste", "--masked-decay", "none")
    s_ste.tensors[f"sparsity/{FC1}/mask"] = torch.zeros(1)
    assert mask_part(s_ste, FC1, recipe_of(s_ste.config), WeightShard((64, 16))) is None


def test_a_part_of_another_shape_is_refused():
    reader: Any = Reader()
    with pytest.raises(CheckpointError, match=r"expects \(64, 20\)"):
        module.effective_part(reader, FC1, recipe_of(reader.config), WeightShard((64, 20)))


def _mask(reader: Any, name: str = FC1) -> torch.Tensor:
    whole = WeightShard(reader.shape(f"param/{name}"))
    found = mask_part(reader, name, recipe_of(reader.config), whole)
    assert found is not None
    return found


@pytest.mark.parametrize("flags", [(), STE])
def test_a_mask_is_the_stored_one_until_it_is_due(flags):
    reader: Any = Reader(*flags)
    stored = _mask(reader)
    reader.tensors[f"param/{FC1}"] = reader.tensors[f"param/{FC1}"].flip(1)
    assert torch.equal(_mask(reader), stored)
    reader.tensors[f"sparsity/{FC1}/counters"] = torch.tensor([0, 1])  # of every fourth step
    state = SparseWeight(FC1, recipe_of(reader.config), WeightShard(stored.shape))
    state.effective_at(reader.tensors[f"param/{FC1}"], 5)
    assert torch.equal(_mask(reader), state.mask) and not torch.equal(state.mask, stored)


@pytest.mark.parametrize(
    ("flags", "whole"),
    [(STE, False), (S_STE, False), ([*S_STE, "--s-ste-scale", "every_step"], True)],
)
def test_a_part_is_read_by_its_own_bytes_unless_its_scale_is_of_the_whole(flags, whole):
    reader: Any = Reader(*flags)
    if whole:
        reader.tensors.pop(f"sparsity/{FC1}/scale", None)
    asked: list[Piece] = []
    read_part = reader.read_part
    reader.read_part = lambda wanted: asked.append(wanted) or read_part(wanted)
    shard = WeightShard((64, 16), 0, 1, 2, 2)
    recipe = recipe_of(reader.config)
    part = module.effective_part(reader, FC1, recipe, shard)
    read = [piece.shard for piece in asked if piece.key == f"param/{FC1}"]
    assert read == [WeightShard((64, 16)) if whole else shard]
    assert torch.equal(part, shard.slice_of(module.effective_weight(reader, FC1, recipe)))
