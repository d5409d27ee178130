"""What holds between layouts: dense to 1e-6; masks until a rounding difference meets a tie."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from megasparse.kernels import prune24_mask, transposable24_mask
from tests import dist
from tests.runs import TINY

# No warm-up, and masks of every step: many ties are passed.
RUN = [
    *TINY[: TINY.index("--sparsity-recipe")], "--train-iters", "12", "--lr", "1e-3",
    "--num-layers", "4",
    "--eval-iters", "0", "--split", "90,10,0",
]  # fmt: skip
DENSE = [*RUN, "--sparsity-recipe", "dense"]
FST = [*RUN, "--sparsity-recipe", "fst", "--masked-decay", "1e-3", "--dense-tail-fraction", "0"]


def _steps(rank: int, world: int, flags: list[str]) -> list[dict[str, Any]]:
    """By step: the loss, and of each sparse weight its shard, its values before the step, and the
    mask that the step made of them."""
    from megasparse.config import load_config, resolve
    from megasparse.train import loop, main

    steps: list[dict[str, Any]] = []

    class Trainer(loop.Trainer):
        def _step(self, stream):
            before = [(s, w.detach().clone()) for s, w in self.controller.weights]
            row = super()._step(stream)
            made = {s.name: (s.shard, w, s.mask.clone()) for s, w in before}
            steps.append({"loss": row["loss"], "weights": made})
            return row

    with mock.patch.object(main, "Trainer", Trainer):
        main.pretrain(resolve(load_config(flags), world))
    return steps


def _both(tmp_path, dataset, flags):
    """The run of one process, and of two tensor-parallel ranks."""
    flags = [*flags, "--data-path", dataset]
    (one,) = dist.run(_steps, 1, [*flags, "--run-dir", str(tmp_path / "one")])
    split = [*flags, "--tensor-model-parallel-size", "2", "--run-dir", str(tmp_path / "two")]
    return one, dist.run(_steps, 2, split)


def test_dense_layouts_differ_by_rounding(tmp_path, dataset):
    one, two = _both(tmp_path, dataset, DENSE)
    for row, other in zip(one, two[0], strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-6)


@pytest.mark.parametrize("search", [prune24_mask, transposable24_mask])
def test_the_last_bit_decides_a_tie(search):
    tied = torch.full((4, 4), 2.0)
    nudged = tied.clone()
    chosen = search(tied)
    nudged[~chosen] = torch.nextafter(nudged[~chosen], torch.tensor(3.0))
    assert torch.equal(search(nudged), ~chosen)


def test_masks_are_equal_until_a_rounding_difference_meets_a_tie(tmp_path, dataset):
    one, two = _both(tmp_path, dataset, FST)
    for step, row in enumerate(one):
        differing = 0
        for ranks in two:
            for name, (shard, weight, mask) in ranks[step]["weights"].items():
                _, whole, expected = row["weights"][name]
                expected, same = shard.slice_of(expected), shard.slice_of(whole).abs().double()
                apart = (weight - shard.slice_of(whole)).abs().double()
                assert float(apart.max()) < 2e-5  # Adam makes much of gradients near 0
                # What each mask keeps of the same weights: where they differ, no more apart than
                # the weights of the two runs.
                kept, theirs = _blocks(same * expected), _blocks(same * mask)
                other = _blocks((mask != expected).double()) > 0
                differing += int(other.sum())
                assert bool(((kept - theirs) <= 2 * _blocks(apart) + 1e-9).all()), (step, name)
        if differing:
            return  # from here on they are two runs, as near as two seeds of rounding
        assert two[0][step]["loss"] == pytest.approx(row["loss"], rel=1e-6), step


def _blocks(matrix: torch.Tensor) -> torch.Tensor:
    """Sums of the 4x4 blocks."""
    rows, columns = matrix.shape
    return matrix.view(rows // 4, 4, columns // 4, 4).sum((1, 3))
