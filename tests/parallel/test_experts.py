"""Mixtures of experts: a run that changes its layout again and again is the run of one process."""

from __future__ import annotations

from unittest import mock

import pytest

from tests import dist
from tests.parallel.layouts import CP2, PP2, SP, TP2, zero
from tests.runs import LLAMA, TINY, train

EP2 = ["--expert-model-parallel-size", "2"]
EP4 = ["--expert-model-parallel-size", "4"]
# 4 experts of 32, a dense layer, a shared expert, both losses of the router. Small steps: masks
# fall the same way in all layouts.
BASE = [
    *TINY, *LLAMA, "--num-experts", "4", "--moe-ffn-hidden-size", "32", "--moe-layer-freq", "[0,1]",
    "--num-layers", "2", "--moe-shared-expert-intermediate-size", "32", "--hidden-size", "32",
    "--moe-aux-loss-coeff", "0.01", "--moe-z-loss-coeff", "0.001", "--seq-length", "64",
    "--global-batch-size", "8", "--lr", "2e-4", "--lr-decay-iters", "40", "--log-interval", "2",
    "--replica-check-interval", "2", "--mask-update-interval", "3",
]  # fmt: skip
RECIPES = {
    "fst": [],
    # Documents do not see each other.
    "s_ste": [
        "--sparsity-recipe", "s_ste", "--masked-decay", "none", "--reset-attention-mask",
        "--reset-position-ids", "--eod-mask-loss",
    ],
}  # fmt: skip
# Each for two steps, from the checkpoint of the one before.
CHAIN: list[tuple[int, list[str]]] = [
    (2, [*EP2, *zero(1)]),
    (4, [*EP4]),
    (4, [*TP2, *SP, *EP2, *zero(1)]),
    (4, [*PP2, *EP2, *zero(1), "--moe-token-dispatcher-type", "allgather"]),
    (4, [*TP2, *SP, *CP2, *EP2, *zero(1)]),  # context parallel ranks share the experts
    (4, [*PP2, *CP2, *zero(1)]),
]
TOLERANCE = 2e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layout_continues_the_run_of_one_process(tmp_path, dataset, recipe):
    chain = CHAIN[:5] if recipe == "fst" else [CHAIN[1], CHAIN[5]]
    steps = 2 * len(chain)
    base = [*BASE, *RECIPES[recipe], "--data-path", dataset, "--train-iters", str(steps)]
    whole = dist.run(train, 1, [*base, "--run-dir", str(tmp_path / "one")])[0]
    run = [*base, "--run-dir", str(tmp_path / "run")]
    for number, (world, flags) in enumerate(chain):
        resumed = ["--resume"] if number else []
        dist.run(train, world, [*run, *flags, *resumed, "--exit-interval", str(2 * number + 2)])
    rows = dist.run(_rows, 1, str(tmp_path / "run"))[0]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row, expected in zip(rows, whole, strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=TOLERANCE), (row["step"], name)
        for name in ("load_balancing_loss", "z_loss", "flip_rate", "density"):
            assert (name in row) == (name in expected), (row["step"], name)
            if name in expected:
                assert row[name] == pytest.approx(expected[name], rel=1e-5), (row["step"], name)
    assert whole[0]["load_balancing_loss"] > 0.9 and whole[0]["z_loss"] > 0


def _rows(rank: int, world: int, folder: str) -> list[dict]:
    from pathlib import Path

    from megasparse.metrics.schema import read_metrics

    return read_metrics(Path(folder) / "metrics.jsonl")


def test_an_expert_that_differs_from_its_replica_is_named(tmp_path, dataset):
    """Ranks with the same experts are compared, and those with others are not."""
    with pytest.raises(Exception, match=r"experts.linear_fc1.weight on rank 2 differs from rank 0"):
        dist.run(_differing, 4, [*BASE, *EP2, "--mock-data", "--train-iters", "2"])


def _differing(rank: int, world: int, flags: list[str]) -> None:
    import torch

    from megasparse.config import load_config, resolve
    from megasparse.megatron.consistency import check_replicas
    from megasparse.megatron.grid import make_grid
    from megasparse.sparsity.run_recipe import recipe_of
    from megasparse.train.build import build_engine
    from megasparse.train.engine.deepspeed import start_process

    config = resolve(load_config(flags), world)
    device = start_process(5.0)
    grid = make_grid(1, device, 1, expert_model_parallel_size=2)
    engine = build_engine(config, grid, recipe_of(config), 128)
    check_replicas(engine.model, engine.controller, grid, 0)
    if rank == 2:
        with torch.no_grad():
            engine.model.decoder.layers[1].mlp.experts.linear_fc1.weight[0, 0] += 1
    check_replicas(engine.model, engine.controller, grid, 1)


# FP8 operands come in tiles of 128.
WIDE = [
    *TINY, *LLAMA, "--num-layers", "2", "--hidden-size", "128", "--ffn-hidden-size", "128",
    "--num-experts", "4", "--moe-layer-freq", "[0,1]", "--moe-aux-loss-coeff", "0.01",
    "--seq-length", "16", "--global-batch-size", "8", "--lr", "2e-4", "--bf16",
    "--lr-decay-iters", "40", "--mask-update-interval", "3", "--train-iters", "4",
    "--fp8-amax-history-len", "3", "--log-interval", "2",
]  # fmt: skip
FP8_RUNS = {
    "fst, delayed": ["--fp8-format", "e4m3"],
    "s_ste, current": ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", *RECIPES["s_ste"]],
}


def _fp8_run(rank: int, world: int, flags: list[str]) -> tuple[list[dict], list[list[float]]]:
    """Rows of a run whose device is said to have FP8, and the scales after every step."""
    from megasparse.fp8.delayed import DelayedScaling

    scales: list[list[float]] = []
    finish = DelayedScaling.finish_step

    def recording(self):
        finish(self)
        scales.append(list(self.assumed))

    with (
        mock.patch("megasparse.fp8.transformer_engine.refusal", return_value=None),
        mock.patch.object(DelayedScaling, "finish_step", recording),
    ):
        return train(rank, world, flags), scales


@pytest.mark.parametrize("name", FP8_RUNS)
def test_fp8_is_the_same_over_expert_parallel_ranks(tmp_path, dataset, name):
    """Two steps on two ranks that share the experts, and two more on one that has all."""
    base = [*WIDE, *FP8_RUNS[name], "--data-path", dataset]
    whole, scales = dist.run(_fp8_run, 1, [*base, "--run-dir", str(tmp_path / "one")])[0]
    run = [*base, "--run-dir", str(tmp_path / "run")]
    shared = [*run, *EP2, *zero(1), "--exit-interval", "2", "--replica-check-interval", "1"]
    (_, ours), (_, theirs) = dist.run(_fp8_run, 2, shared)
    rows, more = dist.run(_fp8_run, 1, [*run, "--resume"])[0]
    assert ours == theirs  # both ranks, exactly
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, expected in zip(rows, whole, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-3)
    # Of x and weights (gradients are twice as large where two ranks take half of the micro-batches
    # each). Powers of two: equal but for those on an edge.
    steps = zip([*ours, *more], scales, strict=True)
    numbered = [enumerate(zip(*step, strict=True)) for step in steps]
    pairs = [pair for step in numbered for n, pair in step if n % 4 < 2]
    assert sum(a == b for a, b in pairs) >= 0.9 * len(pairs)
    assert bool(pairs) == (name == "fst, delayed")
