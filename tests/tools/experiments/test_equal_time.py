"""Equal time: how many steps each variant has, what they are compared with, and the tables."""

from __future__ import annotations

import json

import pytest

from megasparse.config import load_config, resolve
from megasparse.errors import ConfigError, DataError
from tools.experiments import equal_rates, equal_tables, finished
from tools.experiments import equal_time as tool
from tools.experiments.recipe_runs import Work
from tools.experiments.run_queue import RunQueue

RATES = {
    "dense": 100.0,
    "te bf16 fused": 110.0,
    "dense_fp8": 120.0,
    "te fp8 fused": 115.0,
    "fst_fp8": 150.0,
    "row": 75.0,
    "s_ste_fp8": 140.0,
    "s_ste_3_fp8": 145.0,
}


def test_everything_that_a_speed_is_made_of_is_measured():
    assert set(equal_rates.needed(tool.DEFAULT)) == set(RATES)
    assert equal_rates.needed(["s_ste"]) == ["s_ste"]
    for variant in tool.DEFAULT:
        assert equal_rates.rate_of(variant, RATES) > 0


def test_dense_has_the_fastest_layers_and_a_schedule_the_time_of_its_phases():
    assert equal_rates.rate_of("dense", RATES) == 110.0
    assert equal_rates.rate_of("dense_fp8", RATES) == 120.0
    # Of 6 steps 5 take a token's 1/150, one 1/120.
    assert equal_rates.rate_of("fst_tail_fp8", RATES) == pytest.approx(6 / (5 / 150 + 1 / 120))
    assert equal_rates.rate_of("fst_relaxed_fp8", RATES) == pytest.approx(3 / (2 / 150 + 1 / 75))


def test_steps_fill_the_minutes():
    assert tool.steps_in(2.0, 1000.0, 100) == 1200
    assert tool.steps_in(2.0, 1009.0, 100) == 1200  # whole evaluations
    with pytest.raises(ConfigError, match="--minutes 0.01 is less than 12 steps"):
        tool.steps_in(0.01, 1000.0, 100)


def _work(folder, variants=tool.DEFAULT):
    return Work(
        folder,
        "compare_recipes_10m.yaml",
        tool.TEXTS["10m"],
        list(variants),
        [1, 2],
        list(tool.ALL_LINEARS),
        RunQueue(lambda *_: pytest.fail("begun"), say=lambda line: None),
    )


def test_runs_are_as_long_as_their_speed_allows(tmp_path):
    rates = {name: 20_000 * rate for name, rate in RATES.items()}
    tasks = tool.tasks_of(_work(tmp_path), 3.0, rates)
    assert len(tasks) == 2 * len(tool.DEFAULT) == len({task.folder for task in tasks})
    for task, (variant, seed) in tasks.items():
        config = resolve(load_config(task.arguments), 1)
        tokens = config.train.train_iters * config.train.global_batch_size * 512
        whole = 180 * equal_rates.rate_of(variant, rates)
        assert whole - 12 * 65_536 < tokens <= whole and config.train.seed == seed
        assert config.train.train_iters % config.logging.eval_interval == 0
        assert config.fp8.fp8_format == ("e4m3" if variant.endswith("_fp8") else None)
        assert config.sparsity.sparse_layers == tool.ALL_LINEARS[1:]


def test_rates_of_their_own_have_folders_of_their_own(tmp_path):
    work = _work(tmp_path, ["dense_fp8", "fst_fp8"])
    work.rates = {"fst_fp8": ["--lr", "4e-3", "--min-lr", "4e-4"]}
    tasks = tool.tasks_of(work, 3.0, {name: 20_000 * rate for name, rate in RATES.items()})
    folders = {variant: task.folder.parent for task, (variant, _) in tasks.items()}
    assert folders["dense_fp8"] == tmp_path / "minutes-3"
    assert folders["fst_fp8"] == tmp_path / "minutes-3" / "own-rates"
    rates = {variant: load_config(task.arguments).train.lr for task, (variant, _) in tasks.items()}
    assert rates["fst_fp8"] == 4e-3 != rates["dense_fp8"]


def test_the_sweep_trains_for_the_same_time(tmp_path, monkeypatch):
    speeds = {name: 20_000 * rate for name, rate in RATES.items()}
    path = tmp_path / equal_rates.SPEEDS
    path.write_text(json.dumps({"hardware": "a GPU", "rates": speeds}))
    begun = []
    monkeypatch.setattr(
        tool.recipe_sweep, "train", lambda work, tasks: begun.extend(tasks) or list(tasks)
    )
    work = _work(tmp_path, ["dense_fp8", "fst_fp8"])
    more = tool.lengths(work, 3.0, tool.measured_speeds(work).rates)
    assert "nothing is complete yet" in tool.recipe_sweep.sweep(work, [1e-3, 2e-3], more)
    whole = {v: t for t, (v, seed) in tool.tasks_of(work, 3.0, speeds).items() if seed == 1}
    assert len({task.folder for task in begun}) == len(begun) == 4
    for task in begun:
        config, of_run = load_config(task.arguments), load_config(whole[task.kind].arguments)
        assert config.train.train_iters == of_run.train.train_iters
        assert config.train.lr in (1e-3, 2e-3) and config.train.min_lr == config.train.lr / 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep-lr", "1e-3", "--", "--lr", "1"], "choose the rate: not with -- --lr"),
        (["--sweep-lr", "1e-3", "--own-rates"], "not with --own-rates"),
    ],
)
def test_choices_that_do_not_go_together(tmp_path, capsys, flags, message):
    path = tmp_path / "x"
    own = ["--scale", "10m", "--minutes", "1", "--output", str(path)]
    assert tool.main([*own, *flags]) == 64
    assert message in capsys.readouterr().err and not path.exists()


def test_speeds_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="lacks dense, te bf16 fused"):
        tool.compare(_work(tmp_path), 1.0)
    path = tmp_path / equal_rates.SPEEDS
    path.write_text(json.dumps({"hardware": "a GPU", "rates": {"dense": 1.0}}))
    with pytest.raises(ConfigError, match="lacks te bf16 fused, dense_fp8"):
        tool.compare(_work(tmp_path), 1.0)
    path.write_text("[]")
    with pytest.raises(DataError, match="not what equal_time.py writes"):
        equal_rates.read_speeds(tmp_path)


def _run(variant, seed, losses):
    steps = 100 * len(losses)
    curve = [(100 * (number + 1), loss, 0.0) for number, loss in enumerate(losses)]
    figures = {"steps": steps, "tokens": 1000 * steps, "valid_loss": losses[-1]}
    return finished.Finished(variant, seed, {}, None, None, "a GPU", "2026-12-01", figures, curve)


def test_the_tables():
    dense = {1: _run("dense_fp8", 1, [4.0, 3.0]), 2: _run("dense_fp8", 2, [4.0, 3.1])}
    sparse = {1: _run("s_ste_fp8", 1, [3.5, 2.9]), 2: _run("s_ste_fp8", 2, [3.5, 3.05])}
    slow = {1: _run("fst_fp8", 1, [4.0, 3.5])}
    # 200,000 tokens at 1,000 tokens/s: 200 s are 3 minutes and a third.
    rows = [
        equal_tables.row_of(run, 10 / 3, 1000.0, dense.get(seed))
        for group in (dense, sparse, slow)
        for seed, run in group.items()
    ]
    by_run = {(row["variant"], row["seed"]): row for row in rows}
    assert by_run["s_ste_fp8", 1]["curve"] == [
        (pytest.approx(5 / 3), 3.5),
        (pytest.approx(10 / 3), 2.9),
    ]
    # From 3.5 at half of the time to 2.9 at its end: 3.0 after 5/6 of the second half.
    assert by_run["s_ste_fp8", 1]["share"] == pytest.approx(0.5 + 0.5 * 5 / 6)
    assert by_run["dense_fp8", 2]["share"] == pytest.approx(1.0)
    assert by_run["fst_fp8", 1]["share"] is None
    names = ["dense_fp8", "s_ste_fp8", "fst_fp8", "absent"]
    text = "\n".join(equal_tables.report(rows, names, {"row": 7.0}, 10 / 3, "command"))
    # -0.1 and -0.05: their mean, and half of what they differ by.
    assert "| s_ste_fp8 | 2 | 1,000 | 1.000 | 200 | 0.2M | 2.9750 | -0.0750 ± 0.0250 |" in text
    assert "| 3.5000 | +0.5000 | +16.67 | not reached |" in text
    assert "absent" not in text and "| row | 7 |" in text
    chart = equal_tables.chart(rows, names, 10 / 3)
    assert list(chart.curves) == names[:3] and len(chart.curves["fst_fp8"]) == 2


def test_where_a_curve_crosses_a_loss():
    until = equal_tables.share_until
    curve = [(1.0, 5.0), (2.0, 4.0), (4.0, 3.0)]
    assert until(curve, 3.5) == pytest.approx(3.0)
    assert until(curve, 6.0) == 1.0 and until(curve, 2.9) is None


def test_unknown_variants_are_refused(tmp_path, capsys):
    flags = ["--scale", "10m", "--minutes", "1", "--output", str(tmp_path / "x")]
    assert tool.main([*flags, "--only", "fts"]) == 64
    assert "--only fts, expected of dense" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
