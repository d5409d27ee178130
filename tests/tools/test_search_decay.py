"""The decay search: its rule on made-up numbers, its runs, and that it goes on where it stopped."""

from __future__ import annotations

import json

import pytest

from megasparse.errors import ConfigError, MegasparseError
from tests.runs import TINY, make_dataset
from tools import search_decay as tool


def made_up(ratios: dict[float, float | None]):
    """Dense at flip rate 0.02 and candidates at these multiples of it; None: diverged."""
    dense = tool.Run("dense", None, ((8, 0.03), (16, 0.02)), 5.0)
    runs = [
        tool.Run(f"decay-{decay:g}", decay, (), None, diverged=True)
        if mu is None
        else tool.Run(f"decay-{decay:g}", decay, ((8, 0.5), (16, 0.02 * mu)), 5.1)
        for decay, mu in ratios.items()
    ]
    return dense, tool.judge(dense, runs)


@pytest.mark.parametrize(
    "ratios, choice, reason",
    [
        ({1e-5: 1.0, 1e-4: 0.9, 1e-3: 0.3}, 1e-4, "of 1 feasible decay"),
        ({1e-3: 0.62, 1e-5: 0.94, 1e-4: 0.76}, 1e-4, "of 3 feasible decays"),
        ({1e-5: 0.94, 1e-4: 0.93, 1e-3: 0.1}, 1e-4, "nearest to the middle"),
        ({1e-5: 0.875, 1e-4: 0.675}, 1e-5, "mu 0.875"),  # equally near: the smaller
        ({1e-5: 0.95, 1e-4: 0.2}, 1e-5, "mu 0.950"),  # the bounds belong to the range
        ({1e-5: 1.1, 1e-4: 0.6}, 1e-4, "mu 0.600"),
        ({1e-5: 1.3, 1e-4: 0.96}, None, "all are too small, try decays above 0.0001"),
        ({1e-5: 0.59, 1e-4: 0.2}, None, "all are too large, try decays below 1e-05"),
        ({1e-5: 1.0, 1e-4: 0.97, 1e-3: 0.5, 1e-2: 0.1}, None, "between 0.0001 and 0.001"),
        ({1e-5: 0.5, 1e-4: 1.2}, None, "mu does not fall with the decay"),
        ({1e-5: 0.8, 1e-4: None}, 1e-5, "of 1 feasible decay"),
        ({1e-5: None, 1e-4: None}, None, "every run diverged"),
        ({1e-5: 1.0, 1e-4: None}, None, "try decays above 1e-05"),
    ],
)
def test_the_rule(ratios, choice, reason):
    dense, candidates = made_up(ratios)
    assert [c.decay for c in candidates] == sorted(ratios)
    taken, why = tool.choose(candidates)
    assert taken == choice and reason in why
    lines = tool.table(dense, candidates, taken).splitlines()
    assert len(lines) == 2 + len(ratios)
    assert sum(line.endswith("taken") for line in lines) == (choice is not None)


def test_a_dense_run_without_flips_gives_no_ratio():
    dense = tool.Run("dense", None, ((8, 0.0),), 5.0)
    with pytest.raises(MegasparseError, match="flipped nothing at step 8"):
        tool.judge(dense, [tool.Run("decay-0.1", 0.1, ((8, 0.1),), 5.0)])


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--steps", "4"], "more than mask_update_interval 4"),
        (["--steps", "21"], "at most train_iters 20"),
        (["--steps", "9", "--grid", "0", "1e-3"], "above 0"),
        (["--steps", "9", "--sparsity-recipe", "s_ste", "--masked-decay", "none"], "no masked"),
        (["--steps", "9", "--num-ranks", "3"], "global_batch_size"),
        (["--steps", "9", "--gird", "1"], "unknown flag --gird"),
    ],
)
def test_refusals(tmp_path, capsys, flags, match):
    output = ["--output", str(tmp_path / "search")]
    assert tool.main([*TINY, "--mock-data", *output, *flags]) == ConfigError.exit_code
    assert match in capsys.readouterr().err
    assert not (tmp_path / "search").exists()


FAKE_RUN = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
(folder / f"rank-{rank}-of-{world}").touch()
while len(list(folder.glob("rank-*"))) < world:  # the first to end has the others ended
    time.sleep(0.01)
decay = float(sys.argv[::-1][sys.argv[::-1].index("--masked-decay") - 1])
dense = "dense" in folder.name
if decay == 0.5 and not dense:
    print("NumericsError: loss is nan at step 3", file=sys.stderr)
    sys.exit(5)
if decay == 0.25 and not dense:
    print("DataError: no such file", file=sys.stderr)
    sys.exit(3)
if rank == 0:
    rate = 0.02 if dense else 0.02 * (1 - decay)
    rows = [{"step": s, "loss": 5.0, "flip_rate": rate} for s in range(1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
sys.exit(75)  # as a run that --exit-interval ends
"""


def fake_search(monkeypatch, tmp_path, *flags):
    script = tmp_path / "fake_run.py"
    script.write_text(FAKE_RUN)
    monkeypatch.setattr(tool, "LAUNCH", script)
    output = ["--output", str(tmp_path / "search"), "--steps", "9"]
    return tool.main([*TINY, "--mock-data", *output, *flags])


def test_a_diverged_candidate_is_a_result_and_any_other_failure_is_not(
    monkeypatch, tmp_path, capsys
):
    assert fake_search(monkeypatch, tmp_path, "--grid", "0.1", "0.5") == 0
    out = capsys.readouterr().out
    assert "diverged" in out and "taken: 0.1" in out
    assert fake_search(monkeypatch, tmp_path, "--grid", "0.1", "0.25") == 1
    error = capsys.readouterr().err
    assert "decay-0.25 ended with exit code 3" in error and "DataError: no such file" in error


def test_several_ranks_and_foreign_folders(monkeypatch, tmp_path, capsys):
    flags = ["--grid", "0.2", "--num-ranks", "2", "--tensor-model-parallel-size", "2"]
    assert fake_search(monkeypatch, tmp_path, *flags) == 0
    folder = tmp_path / "search" / "decay-0.2"
    assert {p.name for p in folder.glob("rank-*")} == {"rank-0-of-2", "rank-1-of-2"}
    (folder / "search.json").unlink()
    assert fake_search(monkeypatch, tmp_path, *flags) == ConfigError.exit_code
    assert "is not a run of a search" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").exists()


def test_a_run_that_was_cut_off_is_run_again(monkeypatch, tmp_path):
    assert fake_search(monkeypatch, tmp_path, "--grid", "0.1") == 0
    metrics = tmp_path / "search" / "decay-0.1" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(True)[:5]))
    assert fake_search(monkeypatch, tmp_path, "--grid", "0.1") == 0
    assert metrics.read_text() == whole and len(whole.splitlines()) == 9


@pytest.mark.slow
def test_a_search_runs_and_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    """The real training: dense, a decay that changes little, one that freezes the masks."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flags = [*TINY, "--data-path", make_dataset(tmp_path / "data"), "--steps", "9"]
    flags += ["--output", str(tmp_path / "search")]
    assert tool.main([*flags, "--grid", "1e-3"]) == 1
    assert "all are too small" in capsys.readouterr().out
    finished = {
        name: (tmp_path / "search" / name / "metrics.jsonl").stat().st_mtime_ns
        for name in ("dense", "decay-0.001")
    }
    rows = [json.loads(line) for line in (tmp_path / "search/dense/metrics.jsonl").open()]
    assert len(rows) == 9
    assert not any(row["sparse"] or row["masked_decay"] for row in rows)
    rows = [json.loads(line) for line in (tmp_path / "search/decay-0.001/metrics.jsonl").open()]
    assert all(row["sparse"] and row["masked_decay"] == 1e-3 for row in rows)
    lr = [row["lr"] for row in rows]
    assert lr[-1] > 0.5 * max(lr)  # the real run's schedule of 20 steps, not one that ends at 9

    assert tool.main([*flags, "--grid", "10", "1e-3"]) == 1
    assert "refine the grid between 0.001 and 10" in capsys.readouterr().out
    for name, time in finished.items():
        assert (tmp_path / "search" / name / "metrics.jsonl").stat().st_mtime_ns == time
    results = json.loads((tmp_path / "search" / "results.json").read_text())
    assert results["choice"] is None and results["measured_at_step"] == 8
    mild, strong = results["candidates"]
    assert mild["mu"] > 0.95 and strong["mu"] < 0.3
    assert mild["mu"] == pytest.approx(mild["flip_rate"] / results["dense"]["curve"][-1][1])
    assert not (tmp_path / "search" / "decay-10" / "checkpoints").exists()


def test_the_figure_or_why_there_is_none(monkeypatch, tmp_path, capsys):
    assert fake_search(monkeypatch, tmp_path, "--grid", "0.1", "0.3") == 0
    out = capsys.readouterr().out
    figure = tmp_path / "search" / "decay_search.png"
    if tool.plots.available():
        assert f"figure: {figure}" in out
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    else:
        assert "no figure: matplotlib is not installed" in out and not figure.exists()
