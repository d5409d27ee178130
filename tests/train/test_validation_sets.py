"""Several validation sets: each loss is that of a run which validates on that set alone."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megasparse.megatron.data.batches import named_sets
from megasparse.megatron.data.datasets import Source
from tests import dist
from tests.runs import TINY, make_dataset, train


def _runs(rank, world, several):
    return [train(rank, world, flags) for flags in several]


def test_every_set_has_its_loss_and_its_curve(tmp_path, dataset):
    sets = [make_dataset(tmp_path / f"set{n}", documents=20, seed=n + 5) for n in range(2)]
    flags = [*TINY, "--train-iters", "2", "--eval-iters", "2", "--train-data-path", dataset]
    kinds = {"both": [*sets, "--multiple-validation-sets"], "first": sets[:1], "second": sets[1:]}
    runs = [
        [*flags, "--run-dir", str(tmp_path / name), "--valid-data-path", *more]
        for name, more in kinds.items()
    ]
    both, first, second = dist.run(_runs, 1, runs)[0]
    alone = {"set0": first[-1]["valid_loss"], "set1": second[-1]["valid_loss"]}
    assert both[-1]["valid_losses"] == alone and alone["set0"] != alone["set1"]
    assert both[-1]["valid_loss"] == pytest.approx(sum(alone.values()) / 2)
    board = EventAccumulator(str(tmp_path / "both" / "tensorboard"))
    board.Reload()
    for name, loss in alone.items():
        assert board.Scalars(f"curves/validation_loss_{name}")[0].value == pytest.approx(loss)


def test_names_of_sets_are_their_files():
    sources = [Source(prefix, None, "") for prefix in ("a/news", "b/code", "c/news")]
    assert list(named_sets(sources)) == ["news_0", "code", "news_2"]
