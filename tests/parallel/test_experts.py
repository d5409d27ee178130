"""Mixtures of experts: a run that changes its layout again and again is the run of one process."""

from __future__ import annotations

import pytest

from tests import dist
from tests.parallel.layouts import PP2, SP, TP2, zero
from tests.runs import LLAMA, TINY, train

EP2 = ["--expert-model-parallel-size", "2"]
EP4 = ["--expert-model-parallel-size", "4"]
# 4 experts of 32, a dense layer, a shared expert, both losses of the router. Small steps: masks
# fall the same way in all layouts.
BASE = [
    *TINY, *LLAMA, "--num-experts", "4", "--moe-ffn-hidden-size", "32", "--moe-layer-freq", "[0,1]",
    "--num-layers", "2", "--moe-shared-expert-intermediate-size", "32", "--hidden-size", "32",
    "--moe-aux-loss-coeff", "0.01", "--moe-z-loss-coeff", "0.001", "--seq-length", "16",
    "--global-batch-size", "8", "--lr", "2e-4", "--lr-decay-iters", "40", "--log-interval", "2",
    "--replica-check-interval", "2", "--mask-update-interval", "3",
]  # fmt: skip
RECIPES = {
    "fst": [],
    "s_ste": ["--sparsity-recipe", "s_ste", "--masked-decay", "none"],
}
# Each for two steps, from the checkpoint of the one before.
CHAIN: list[tuple[int, list[str]]] = [
    (2, [*EP2, *zero(1)]),
    (4, [*EP4]),
    (4, [*TP2, *SP, *EP2, *zero(1)]),
    (4, [*PP2, *EP2, *zero(1), "--moe-token-dispatcher-type", "allgather"]),
]
TOLERANCE = 2e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layout_continues_the_run_of_one_process(tmp_path, dataset, recipe):
    chain = CHAIN if recipe == "fst" else CHAIN[1:3]
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
