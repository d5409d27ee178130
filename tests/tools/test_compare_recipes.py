"""The comparison of recipes: what each run is, what its figures are, and that none is repeated."""

from __future__ import annotations

import json

import pytest

from tests import dist
from tests.tools.test_compress_tools import _tool

SMALL = [
    "--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "16",
    "--train-iters", "12", "--eval-interval", "4", "--eval-iters", "2", "--log-interval", "4",
]  # fmt: skip
NAMES = ["dense", "half", "ste", "sr_ste", "fst", "s_ste", "fst_every_40"]


def _compare(rank, world, folder, names):
    """The comparison with trainings in this process, twice; how many trainings there were."""
    from pathlib import Path

    from tests.runs import train

    tool = _tool("compare_recipes")
    launched = []

    def launch(arguments):
        launched.append(arguments)
        train(0, 1, arguments)

    text = tool.comparison.Text(400, 300_000, False, 1)
    work = tool.Work(
        Path(folder), "compare_recipes_cpu.yaml", text, names, [1, 2], SMALL, launch, []
    )
    first = tool.compare(work)
    return first == tool.compare(work), len(launched)


def test_every_variant_is_trained_once_a_seed(tmp_path):
    same, launched = dist.run(_compare, 1, str(tmp_path), NAMES)[0]
    assert same and launched == 2 * len(NAMES)
    rows = {
        (r["variant"], r["seed"]): r for r in json.loads((tmp_path / "results.json").read_text())
    }
    assert len(rows) == 2 * len(NAMES) and all(row["steps"] == 12 for row in rows.values())
    losses = {row["valid_loss"] for row in rows.values()}
    assert len(losses) == len(rows)  # no two runs are the same
    assert all(rows["dense", seed]["gap"] == 0 for seed in (1, 2))
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {name} | " in table for name in NAMES)
    assert (tmp_path / "pictures" / "index.html").is_file()

    from megasparse.config import load_config

    def config(name):
        return load_config([], str(tmp_path / f"{name}-seed-2" / "config.yaml"))

    assert config("half").model.ffn_hidden_size == config("dense").model.ffn_hidden_size // 2
    assert config("dense").sparsity.sparsity_recipe == "dense"
    assert config("fst").sparsity.mask_update_interval == 1
    assert config("fst_every_40").sparsity.mask_update_interval == 40
    assert config("fst").sparsity.dense_tail_fraction == 0.0
    assert config("fst").train.seed == 2
    # The same data in the same order for all of a seed.
    digests = {
        tuple(
            json.loads(line)["samples"]
            for line in (tmp_path / f"{name}-seed-1" / "metrics.jsonl").open()
        )
        for name in NAMES
    }
    assert len(digests) == 1


def test_the_share_of_the_dense_run():
    share = _tool("compare_recipes").share_of
    curve = [(10, 5.0), (20, 4.0), (40, 3.0)]
    assert share(curve, 3.5) == pytest.approx(30 / 40)
    assert share(curve, 4.0) == pytest.approx(20 / 40)
    assert share(curve, 6.0) == pytest.approx(10 / 40)  # before its first evaluation
    assert share(curve, 2.9) == 1.0 and share(curve, 3.0) == 1.0


def test_an_unknown_variant_is_refused(tmp_path, capsys):
    tool = _tool("compare_recipes")
    assert tool.main(["--output", str(tmp_path / "x"), "--only", "fts"]) == 64
    assert "--only fts, expected of dense, half" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_configurations_of_all_scales_are_valid():
    from megasparse.config import load_config, resolve

    tool = _tool("compare_recipes")
    for scale in tool.TEXTS:
        for flags in (tool.VARIANTS | tool.ABLATIONS).values():
            path = str(tool.comparison.ROOT / "configs" / f"compare_recipes_{scale}.yaml")
            resolve(load_config(["--config", path, *flags]), 1)
