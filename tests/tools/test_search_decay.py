"""The decay search: its runs, and that it goes on where it stopped."""

from __future__ import annotations

import json

import pytest

from megasparse.errors import ConfigError
from tests.runs import TINY, make_dataset
from tools import search_decay as tool


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


def test_a_search_runs_and_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys, quick_python):
    """The real training: dense, a decay that changes little, one that freezes the masks."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("sys.executable", str(quick_python))
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
