"""CAST in whole runs: dense GEMMs with scales, a decay that leaves half of the weights, layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.model import StoredModel
from megasparse.errors import ConfigError
from megasparse.kernels import is_24, prune24_mask
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.weight_scale import scale_shard, scaled
from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.checkpoint.parts import check_parts
from tests.distillation.runs import AST, TEACHER
from tests.parallel.layouts import PP2, SP, TP2, zero
from tests.runs import train

CAST = [
    *AST, "--sparsity-recipe", "cast", "--masked-decay", "1e-3", "--masked-decay-ramp-iters",
    "none", "--lr", "3e-4", "--eval-iters", "1", "--eval-interval", "5", *TEACHER,
    "--replica-check-interval", "2",
]  # fmt: skip


def _run(folder, dataset, dense, flags, world=1):
    arguments = [*CAST, "--load", dense, "--data-path", dataset, "--run-dir", str(folder), *flags]
    return dist.run(train, world, arguments)[0]


@pytest.fixture(scope="module")
def single(tmp_path_factory, dataset, dense):
    folder = tmp_path_factory.mktemp("single")
    return _run(folder, dataset, dense, []), folder


def _close(rows, expected):
    for row, one in zip(rows, expected, strict=True):
        for figure in ("loss", "kd_loss", "valid_loss"):
            if figure in one:
                wanted = pytest.approx(one[figure], rel=1e-5, abs=1e-6)
                assert row[figure] == wanted, (figure, one["step"])
        assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), one["step"]


@pytest.mark.parametrize(
    ("world", "layout"),
    [(4, [*TP2, *SP, *PP2, *zero(1)]), (2, zero(2))],
    ids=["tp 2, sp, pp 2, zero 1", "dp 2, zero 2"],
)
def test_layout_gives_the_numbers_of_one_process(tmp_path, dataset, dense, single, world, layout):
    _close(_run(tmp_path, dataset, dense, layout, world), single[0])


def test_another_layout_continues_the_run(tmp_path, dataset, dense, single):
    _run(tmp_path, dataset, dense, [*TP2, "--exit-interval", "6"], 2)
    _close(_run(tmp_path, dataset, dense, ["--resume"]), single[0])


def test_training_is_dense_and_what_is_saved_is_pruned_and_scaled(dataset, dense, single):
    rows, folder = single
    # The first step is the dense model's: nothing to learn from the teacher yet.
    assert rows[0]["kd_loss"] == pytest.approx(0.0, abs=1e-6) and rows[0]["masked_decay"] == 0.0
    assert rows[-1]["masked_decay"] == pytest.approx(1e-3 * 9 / 10)
    reader = newest_valid(Path(folder) / "checkpoints")
    stored, master = StoredModel(reader), StoredModel(reader, effective=False)
    assert len(stored.sparse) == 8
    check_parts(stored, 2)
    for name in stored.sparse:
        weight = reader.read(f"param/{name}")
        scale = reader.read(f"param/{name.removesuffix('.weight')}.weight_scale")
        assert scale.shape == (weight.shape[0], 2) and not torch.equal(scale, torch.ones(()))
        assert torch.equal(master.read(name), scaled(weight, scale))
        found = stored.read(name)
        assert is_24(found)
        mask = found != 0
        assert torch.equal(found, torch.where(mask, master.read(name), 0.0))
        size = weight.abs()
        now = size[prune24_mask(weight)].sum() / size.sum()
        before = newest_valid(Path(dense)).read(f"param/{name}").abs()
        assert now > before[prune24_mask(before)].sum() / before.sum() + 1e-3  # on its way


def _stored_loss(rank, world, folder, micro_batches):
    from megasparse.inference.offline import OfflineModel, StoredRun

    stored = StoredRun(folder)
    model = OfflineModel(stored)
    model.put(stored.folded())
    return model.loss(micro_batches)


def test_evaluations_are_of_the_pruned_model(single):
    rows, folder = single
    (loss,) = dist.run(_stored_loss, 1, folder / "checkpoints", 4)
    assert rows[-1]["valid_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--zero-stage", "3"], "cast with zero_stage 3"),
        (["--fp8-format", "e4m3", "--bf16"], "cast with fp8_format"),
        (["--slorb-k", "8"], "slorb_k 8 with the recipe cast"),
        (["--mvue", "exact"], "recipe cast: mvue exact, but it trains with dense GEMMs"),
        (["--masked-decay-ramp-iters", "5"], "masked_decay_ramp_iters 5"),
        (["--weight-scale-groups", "3"], "weight_scale_groups 3 of a weight of 32 inputs"),
        (["--sparsity-recipe", "ast", "--weight-scale-groups", "2"], "recipe ast: weight_scale"),
    ],
)
def test_refusals(tmp_path, dataset, dense, flags, match):
    with pytest.raises(Exception, match=match):
        _run(tmp_path, dataset, dense, flags)


def test_scales_and_their_shards():
    torch.manual_seed(0)
    weight, scale = torch.randn(8, 16, requires_grad=True), torch.rand(8, 2, requires_grad=True)
    whole = torch.empty(8, 16)
    for row in range(8):
        for column in range(16):
            whole[row, column] = weight[row, column] * scale[row, column // 8]
    found = scaled(weight, scale)
    assert torch.equal(found, whole)
    gradient = torch.randn(8, 16)
    found.backward(gradient)
    torch.testing.assert_close(weight.grad, gradient * scale.detach().repeat_interleave(8, 1))
    product = gradient * weight.detach()
    torch.testing.assert_close(scale.grad, torch.stack([product[:, :8], product[:, 8:]], 2).sum(1))
    for dim, parts in ((0, 2), (1, 1)):
        for rank in range(2):
            shard = WeightShard((8, 16), dim, rank, 2, parts)
            own = scale_shard(shard, 2).slice_of(scale.detach())
            part = scaled(shard.slice_of(weight.detach()), own)
            assert torch.equal(part, shard.slice_of(whole))
    with pytest.raises(ConfigError, match="tensor_model_parallel_size 4, expected a multiple"):
        scale_shard(WeightShard((8, 16), 1, 0, 4), 2)
