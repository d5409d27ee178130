"""tools/plot_runs.py and tools/inspect_sparsity.py: curves, statistics, bad input.

The tutorial's test runs both on a real run.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tests import dist
from tests.browser import open_page
from tests.runs import TINY, train
from tools import inspect_sparsity, plot_runs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    from tests.runs import make_dataset

    folder = tmp_path_factory.mktemp("plot")
    dataset = make_dataset(folder / "data")
    dist.run(
        train,
        1,
        [
            *TINY,
            "--data-path",
            dataset,
            "--run-dir",
            str(folder / "run"),
            "--train-iters",
            "6",
            "--mask-update-interval",
            "2",
        ],
    )
    return folder / "run"


def test_curves_are_the_rows(run_dir):
    run = plot_runs.read_run(run_dir, "a")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert plot_runs.curve(run, "tokens", "loss") == [
        (32 * row["consumed_samples"], row["loss"]) for row in rows
    ]
    seconds = sum(4 * 32 / row["tokens_per_second"] for row in rows)
    assert run.rows[-1]["hours"] == pytest.approx(seconds / 3600)
    # Refreshes before steps 3 and 5 (the first one has nothing to be compared with).
    flips = plot_runs.refreshes(run)
    assert [step for step, _ in flips] == [3, 5]
    assert flips == [(3, rows[2]["flip_rate"]), (5, rows[4]["flip_rate"])]
    charts = {chart.name: chart for chart in plot_runs.make_charts([run, run], 2)}
    assert charts["loss_tokens"].curves["a"][0] == (256, (rows[0]["loss"] + rows[1]["loss"]) / 2)
    assert "validation" not in charts  # nothing to draw


def test_smoothing():
    points = [(1, 1.0), (2, 3.0), (3, 5.0)]
    assert plot_runs.smoothed(points, 2) == [(2, 2.0), (3, 4.0)]
    assert plot_runs.smoothed(points, 1) == points
    assert plot_runs.smoothed(points, 5) == points


def _refused(capsys, tool, arguments):
    code = tool.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return code, error


def test_bad_input_is_one_line(run_dir, tmp_path, capsys):
    code, error = _refused(capsys, plot_runs, [tmp_path, "--output", tmp_path / "out"])
    assert code == 65 and "no config.yaml, expected the --run-dir of a run" in error
    code, error = _refused(capsys, plot_runs, [run_dir, run_dir])
    assert code == 64 and "given twice" in error
    code, error = _refused(capsys, plot_runs, [run_dir, "--label", "a", "b"])
    assert code == 64 and "2 --label for 1 runs" in error
    (tmp_path / "file").write_text("")
    code, error = _refused(capsys, plot_runs, [run_dir, "--output", tmp_path / "file" / "out"])
    assert code == 74 and "cannot be written" in error
    code, error = _refused(capsys, inspect_sparsity, [tmp_path])
    assert code == 66 and "holds no checkpoint" in error


def test_a_browser_shows_the_page_with_its_curves_and_its_table(run_dir, tmp_path):
    assert plot_runs.main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    shown = open_page((tmp_path / "out" / "index.html").as_uri(), tmp_path)
    assert "<td" in shown.dom and "training loss, last" in shown.dom
    assert shown.count(255, 255, 255) > 100_000  # of the charts
    assert len(np.unique(shown.pixels.reshape(-1, 3), axis=0)) > 50  # with lines in them


def test_names_with_markup_are_text(run_dir):
    run = plot_runs.read_run(run_dir, "<script>alert(1)</script>")
    page = plot_runs.page(plot_runs.table([run]), plot_runs.make_charts([run], 1))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_statistics_of_a_checkpoint(run_dir, capsys):
    reader = inspect_sparsity.open_checkpoint(run_dir)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    recipe = inspect_sparsity.recipe_of(inspect_sparsity.from_dict(reader.meta["config"], "test"))
    layer = inspect_sparsity.inspect_layer(reader, name, recipe, sparse=True)
    assert layer.shape == (256, 64) and sum(layer.counts) == 256 * 64 // 16
    assert len(layer.counts) == 90 and layer.density == 0.5
    assert 0.5 < layer.retained_l1 < layer.retained_l2 < 1
    assert 0 < layer.entropy <= math.log2(90)
    assert layer.stale is not None and 0 < layer.stale < 0.2  # the mask is one step old
    assert inspect_sparsity.main([str(reader.folder)]) == 0
    shown = capsys.readouterr().out
    assert "recipe fst, step 6, sparse phase" in shown and shown.count("linear_fc") == 4
