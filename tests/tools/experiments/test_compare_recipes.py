"""The comparison of recipes: what each run is, what its figures are, and that none is repeated."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from megasparse.errors import ConfigError, DataError
from tests import dist
from tools.experiments import compare_recipes as tool
from tools.experiments import recipe_runs, recipe_tables

SMALL = [
    "--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "16",
    "--train-iters", "12", "--eval-interval", "4", "--eval-iters", "2", "--log-interval", "4",
]  # fmt: skip
NAMES = [
    "dense", "half", "ste", "fst_tail", "sr_ste", "fst", "s_ste", "fst_relaxed", "fst_every_40",
    "s_ste_scale_recomputed",
]  # fmt: skip


COMMON = ("metrics.jsonl", "config.yaml", "finished.json")


class _Ended:
    """A process that has ended well."""

    def poll(self):
        return 0


def _compare(rank, world, folder, names):
    """The comparison with trainings in this process, twice, and a sweep; what was trained."""
    from pathlib import Path

    from tests.runs import train

    launched = []

    def start(arguments, extra, log):
        assert not extra and log is None
        branch = "--branch-from" in arguments and arguments[arguments.index("--branch-from") + 1]
        launched.append((arguments[arguments.index("--run-dir") + 1], branch))
        train(0, 1, list(arguments))
        return _Ended()

    text = tool.corpus_data.Text(400, 300_000, False, 1)
    queue = tool.RunQueue(start, say=lambda line: None)
    work = tool.Work(Path(folder), "compare_recipes_cpu.yaml", text, names, [1, 2], SMALL, queue)
    first = tool.compare(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.plots, "available", lambda: False)  # drawn once is enough
        again = tool.compare(work)
        work.variants = ["dense"]
        swept = tool.recipe_sweep.sweep(work, [1e-3, 4e-3, 2e-3])
        work.rates, work.table = tool.recipe_sweep.own_rates(work), "own_rates"
        own = tool.compare(work)
    return first == again, launched, swept, own


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison's folder, and what `_compare` gave."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, dist.run(_compare, 1, str(folder), NAMES)[0]


def test_every_variant_is_trained_once_a_seed(compared):
    folder, (same, launched, *_) = compared
    assert same and len(launched) == len(set(launched))
    assert len({run for run, _ in launched if "own-rates" not in run}) == 2 * len(NAMES) + 3
    rows = {(r["variant"], r["seed"]): r for r in json.loads((folder / "results.json").read_text())}
    assert len(rows) == 2 * len(NAMES) and all(row["steps"] == 12 for row in rows.values())
    losses = {row["valid_loss"] for row in rows.values()}
    assert len(losses) == len(rows)  # no two runs are the same
    assert all(rows["dense", seed]["gap"] == 0 for seed in (1, 2))
    table = (folder / "results.md").read_text()
    lines = table.splitlines()
    counts = {n: sum(line.startswith(f"| {n} | 2 | ") for line in lines) for n in NAMES}
    assert counts == {name: 1 + (name in ("fst_tail", "fst_relaxed")) for name in NAMES}
    assert "Not run yet" not in table and "## Noise" in table
    _check_ablations(rows, table)
    assert (folder / "pictures" / "index.html").is_file()

    from megasparse.config import load_config

    def config(name):
        return load_config([], str(folder / f"{name}-seed-2" / "config.yaml"))

    assert config("half").model.ffn_hidden_size == config("dense").model.ffn_hidden_size // 2
    assert config("dense").sparsity.sparsity_recipe == "dense"
    assert config("fst").sparsity.mask_update_interval == 1
    assert config("fst_every_40").sparsity.mask_update_interval == 40
    assert config("fst").sparsity.dense_tail_fraction == 0.0
    assert config("fst").train.seed == 2
    # The same data in the same order for all of a seed; a tail has those of its own steps.
    samples = {
        name: [
            json.loads(line)["samples"]
            for line in (folder / f"{name}-seed-1" / "metrics.jsonl").open()
        ]
        for name in NAMES
    }
    for name, own in samples.items():
        assert own == samples["dense"][-len(own) :]
        assert (len(own) == 12) == (name not in ("fst_tail", "fst_relaxed"))


def _check_ablations(rows, table):
    """They have a section of their own, beside what they change and beside dense."""
    section = table.partition("## Beside what they change")[2].partition("##")[0]
    for name, base in (("fst_every_40", "fst"), ("s_ste_scale_recomputed", "s_ste")):
        gaps, nats = [], []
        for seed in (1, 2):
            row = rows[name, seed]
            gaps.append(row["valid_loss"] / rows[base, seed]["valid_loss"] - 1)
            nats.append(row["valid_loss"] - rows[base, seed]["valid_loss"])
            assert row["base"] == base and row["gap_to_base"] == pytest.approx(gaps[-1])
        (line,) = (line for line in section.splitlines() if line.startswith(f"| {name} |"))
        # Of two values the standard error is half of what they differ by.
        error = abs(nats[0] - nats[1]) / 2
        assert (
            f" | {base} | 2 | {sum(nats) / 2:+.4f} ± {error:.4f} | {50 * sum(gaps):+.2f} ±" in line
        )
    assert "\n| fst |" not in section and rows["fst", 1]["gap_to_base"] is None


def test_tails_go_on_from_the_run_that_they_begin_as(compared):
    folder, (_, launched, *_) = compared
    starts = {run.rpartition("/")[2]: branch for run, branch in launched}
    for seed in (1, 2):
        saved = f"{folder}/fst-seed-{seed}/checkpoints/step-000000"
        assert starts[f"fst_tail-seed-{seed}"] == f"{saved}10"
        assert starts[f"fst_relaxed-seed-{seed}"] == f"{saved}08"
        assert not starts[f"fst-seed-{seed}"] and not starts[f"fst_every_40-seed-{seed}"]
    # The tail's first rows are those of the steps after it.
    rows = [json.loads(line) for line in (folder / "fst_tail-seed-1" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [11, 12]


def test_a_tail_is_trained_whole_where_its_begin_is_gone(compared, tmp_path):
    folder, _ = compared
    _travel(folder, tmp_path)
    shutil.rmtree(tmp_path / "fst_tail-seed-1")
    work = _work(tmp_path, _never)
    tasks = {work.task(name, 1): (name, 1) for name in ("fst", "fst_tail")}
    assert recipe_runs.with_branches(tasks) == tasks
    (tmp_path / "fst-seed-1" / "finished.json").unlink()
    _, tail = recipe_runs.with_branches(tasks)
    assert tail.needs == tmp_path / "fst-seed-1" / "checkpoints" / "step-00000010"
    # Another rate, or steps that saves do not divide, are another run from its first step.
    work.rates = {"fst_tail": ["--lr", "0.5"]}
    tasks = {work.task(name, 1): (name, 1) for name in ("fst", "fst_tail")}
    assert recipe_runs.with_branches(tasks) == tasks
    work.rates, work.flags = {}, [*work.flags, "--train-iters", "13"]
    tasks = {work.task(name, 1): (name, 1) for name in ("fst", "fst_tail")}
    assert recipe_runs.with_branches(tasks) == tasks


def test_a_run_that_would_see_text_twice_is_refused(compared):
    folder, _ = compared
    check = tool.corpus_data.check_fresh
    sidecar = json.loads((folder / "data_text_document.json").read_text())
    tokens = int(sidecar["num_tokens"] * 0.95)  # the split's share for training
    arguments = _work(folder, _never).task("dense", 1).arguments
    check(folder, [*arguments, "--train-iters", str(tokens // (8 * 16))])
    with pytest.raises(ConfigError, match=rf"tokens a run, but .* has {tokens:,} for training"):
        check(folder, [*arguments, "--train-iters", str(tokens // (8 * 16) + 1)])


def test_own_rates_repeat_only_runs_whose_best_rate_is_another(compared):
    folder, (_, launched, _, own) = compared
    best = min(json.loads((folder / "sweep.json").read_text()), key=lambda row: row["valid_loss"])
    runs = {run.rpartition("/")[2] for run, _ in launched if "/own-rates/" in run}
    assert runs == (set() if best["lr"] == 2e-3 else {"dense-seed-1", "dense-seed-2"})
    assert own == (folder / "own_rates.md").read_text().rstrip("\n")


def test_the_sweep_names_the_rate_with_the_lowest_loss(compared):
    folder, (_, _, table, _) = compared
    rows = json.loads((folder / "sweep.json").read_text())
    assert [row["lr"] for row in rows] == [1e-3, 4e-3, 2e-3]
    best = min(rows, key=lambda row: row["valid_loss"])["lr"]
    assert f"`-- --lr {best:g} --min-lr {best / 10:g}`" in table
    assert (best in (1e-3, 4e-3)) == ("at the end of what was tried" in table)
    lowest = [line for line in table.splitlines() if line.endswith("| lowest |")]
    assert len(lowest) == 1 and lowest[0].startswith(f"| {best:g} |")


def _work(folder, start, *more, **options):
    return tool.Work(
        folder,
        "compare_recipes_cpu.yaml",
        tool.corpus_data.Text(400, 300_000, False, 1),
        NAMES,
        [1, 2],
        [*SMALL, *more],
        tool.RunQueue(start, **options),
    )


def _never(arguments, extra, log):
    raise AssertionError(f"begun: {arguments}")


def _travel(folder, target, names=COMMON):
    for path in folder.glob("*-seed-*"):
        if path.is_dir():
            (target / path.name).mkdir(parents=True)
            for name in names:
                shutil.copy(path / name, target / path.name)


def test_small_files_are_enough_for_the_table(compared, tmp_path):
    folder, _ = compared
    _travel(folder, tmp_path)
    tool.compare(_work(tmp_path, _never))
    for name in ("results.md", "results.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    assert (tmp_path / "pictures" / "index.html").is_file()


def test_times_of_runs_that_shared_a_gpu_are_left_out(compared, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.plots, "available", lambda: False)
    _travel(compared[0], tmp_path)
    speeds = {}
    for seed, alone in ((1, True), (2, False)):
        path = tmp_path / f"fst-seed-{seed}" / "finished.json"
        record = json.loads(path.read_text())
        assert record["alone"]
        speeds[seed] = record["figures"]["tokens_per_second"]
        path.write_text(json.dumps(record | {"alone": alone}))
    table = tool.compare(_work(tmp_path, _never))
    row = next(line for line in table.splitlines() if line.startswith("| fst | 2 |"))
    assert f"| {speeds[1]:,.0f} |" in row
    path = tmp_path / "fst-seed-1" / "finished.json"
    path.write_text(path.read_text().replace('"alone": true', '"alone": false'))
    table = tool.compare(_work(tmp_path, _never))
    row = next(line for line in table.splitlines() if line.startswith("| fst | 2 |"))
    assert row.endswith(" | - | - | - |")


def test_runs_of_another_comparison_are_refused(compared, tmp_path):
    folder, _ = compared
    _travel(folder, tmp_path)
    with pytest.raises(ConfigError, match=r"dense-seed-1: finished with lr 0\.002, .* has 0\.5"):
        tool.compare(_work(tmp_path, _never, "--lr", "0.5"))
    path = tmp_path / "fst-seed-2" / "finished.json"
    path.write_text(path.read_text().replace('"data": "', '"data": "0'))
    with pytest.raises(ConfigError, match="fst-seed-2: finished on tokens of sha256 0"):
        tool.compare(_work(tmp_path, _never))
    path.write_text("[]")
    with pytest.raises(DataError, match="fst-seed-2/finished.json"):
        tool.compare(_work(tmp_path, _never))


def test_what_the_time_limit_leaves_out_is_named(compared, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.plots, "available", lambda: False)
    folder, _ = compared
    _travel(folder, tmp_path)
    for name in ("half-seed-1", "dense-seed-2"):
        shutil.rmtree(tmp_path / name)
    table = tool.compare(_work(tmp_path, _never, deadline=time.monotonic() - 1))
    assert "Not run yet: half, seed 1, dense, seed 2." in table
    rows = {
        (r["variant"], r["seed"]): r for r in json.loads((tmp_path / "results.json").open().read())
    }
    assert len(rows) == 2 * len(NAMES) - 2
    assert rows["fst", 1]["gap"] is not None and rows["fst", 2]["gap"] is None
    assert "| half | 1 | " in table
    assert not (tmp_path / "tokenizer.model").exists()  # for nothing that begins no data are made


def test_two_runs_at_a_time_are_what_they_are_alone(
    compared, tmp_path, capsys, monkeypatch, quick_python
):
    """Real processes, beside each other, with the flags of a user."""
    monkeypatch.setattr("sys.executable", str(quick_python))
    folder, _ = compared
    for name in (
        "data_text_document.bin",
        "data_text_document.idx",
        "data_text_document.json",
        "tokenizer.model",
    ):
        shutil.copy(folder / name, tmp_path)
    arguments = ["--output", str(tmp_path), "--jobs", "2", "--seeds", "1", "2", "--only", "dense"]
    assert tool.main([*arguments, "--discard-checkpoints", "--", *SMALL]) == 0
    printed = capsys.readouterr().out
    for seed in (1, 2):
        name = f"dense-seed-{seed}"
        assert f"dense, seed {seed}: done in " in printed
        assert "Run finished" in (tmp_path / f"{name}.log").read_text()
        assert not (tmp_path / name / "checkpoints").exists()

        def losses(where, name=name):
            rows = map(json.loads, (where / name / "metrics.jsonl").open())
            return [(row["loss"], row.get("valid_loss")) for row in rows]

        assert losses(tmp_path) == losses(folder)
    assert f"--jobs 2 --seeds 1 2 --only dense --discard-checkpoints -- {SMALL[0]}" in printed


def test_impossible_flags_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool.run_queue, "visible_gpus", lambda: ["4", "5"])
    for flags, message in (
        (["--jobs", "0"], "--jobs 0, expected at least 1"),
        (["--jobs", "3"], "--jobs 3, expected at most 2, one a GPU"),
        (["--jobs", "2", "--launcher", "deepspeed"], "--jobs 2 with --launcher 'deepspeed'"),
        (["--sweep-lr", "1e-3", "--fp8"], "--sweep-lr trains dense or --only"),
        (["--sweep-lr", "1e-3", "--", "--lr", "1"], "choose the rate: not with -- --lr"),
        (["--own-rates"], "sweep.json is not there"),
    ):
        assert tool.main(["--output", str(tmp_path / "x"), *flags]) == 64
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_share_of_the_dense_run():
    share = recipe_tables.share_of
    curve = [(10, 5.0), (20, 4.0), (40, 3.0)]
    assert share(curve, 3.5) == pytest.approx(30 / 40)
    assert share(curve, 4.0) == pytest.approx(20 / 40)
    assert share(curve, 6.0) == pytest.approx(10 / 40)  # before its first evaluation
    assert share(curve, 2.9) == 1.0 and share(curve, 3.0) == 1.0


def _rows(**gaps):
    return [
        {"variant": name, "seed": seed, "gap": gap, "valid_loss": 2.0 + 0.02 * seed}
        for name, values in gaps.items()
        for seed, gap in enumerate(values)
    ]


def test_the_paragraph_on_noise():
    noise = recipe_tables.noise
    one = noise(_rows(dense=[0.0], fst=[0.01]))
    assert one[-1] == "No variant has a gap to dense for two seeds: the noise is not known."
    two = noise(
        _rows(
            dense=[0.0, 0.0],
            fst=[0.001, 0.0035],
            ste=[0.05, 0.052],
            s_ste=[0.0035],
            late=[None],
            half=[0.05, 0.051],
        )
    )
    text = "\n".join(two)
    assert "3 variants with two seeds or more) is 0.18 percentage points on average" in text
    assert "at most 0.25 (fst); the validation losses of dense itself lie 1.00 % apart" in text
    # fst is 0.002 above dense and varies by as much; ste is above half by less than that varies.
    assert two[-2:] == [
        "- dense is lower than ste, half",
        "- fst is lower than ste, half",
    ]
    assert noise(_rows(dense=[0.0, 0.0], fst=[-0.01, 0.01]))[-1] == "- none"


def test_gaps_on_the_way_are_of_the_same_step_and_the_mean_of_seeds():
    on_the_way = recipe_tables.on_the_way
    steps = range(10, 90, 10)
    rows = [
        {"variant": "fst", "seed": seed, "gaps": {s: (s + seed) / 1000 for s in steps}}
        for seed in (0, 2)
    ]
    rows.append({"variant": "late", "seed": 0, "gaps": {}})
    assert on_the_way(rows, ["dense", "fst", "late"])[-3:] == [
        "| variant | seeds | step 20 | step 40 | step 60 | step 80 |",
        "|---|---:|---:|---:|---:|---:|",
        "| fst | 2 | +2.10 ± 0.10 | +4.10 ± 0.10 | +6.10 ± 0.10 | +8.10 ± 0.10 |",
    ]
    assert on_the_way([{"variant": "fst", "seed": 0, "gaps": {10: 0.0}}], ["fst"]) == []


def test_the_table_of_starts_correlates_first_and_last_gaps():
    starts = recipe_tables.starts

    def row(variant, first, last, norm=None):
        gaps = {10: first, 20: 0.5, 30: last}
        return {"variant": variant, "seed": 1, "gaps": gaps, "gap": last, "grad_norm_highest": norm}

    rows = [
        row("dense", 0.0, 0.0, [2.0, 7]),
        row("fst", 0.02, 0.03, [31.25, 9]),
        row("ste", 0.01, 0.01),
        row("half", 0.01, 0.03),
        row("s_ste", 0.02, 0.01),
    ]
    text = starts(rows)
    assert "at the end correlate by 0.00 over 4 runs" in text[3]
    assert text[6:9] == [
        "|---|---:|---:|---:|",
        "| dense, seed 1 | 2.0 (7) | +0.00 % | +0.00 % |",
        "| ste, seed 1 | - | +1.00 % | +1.00 % |",
    ]
    assert "| fst, seed 1 | 31.2 (9) | +2.00 % | +3.00 % |" in text
    assert "correlate by 1.00 over 4" in starts([*rows[:3], row("a", 0, 0), row("b", 1, 2)])[3]
    assert "correlate by - over 4" in starts([row(name, 0.1, 0.2) for name in "abcd"])[3]
    assert starts(rows[:4]) == []


def test_an_unknown_variant_is_refused(tmp_path, capsys):
    assert tool.main(["--output", str(tmp_path / "x"), "--only", "fts"]) == 64
    assert "--only fts, expected of dense, fst, fst_tail" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_configurations_of_all_scales_are_valid():
    from megasparse.config import load_config, resolve

    for scale in tool.TEXTS:
        on_cpu = {name: f for name, f in tool.ALL_VARIANTS.items() if name not in tool.IN_FP8}
        for flags in (on_cpu if scale == "cpu" else tool.ALL_VARIANTS).values():
            path = str(
                tool.corpus_data.ROOT / "configs" / "experiments" / f"compare_recipes_{scale}.yaml"
            )
            resolve(load_config(["--config", path, *flags]), 1)
