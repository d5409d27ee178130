"""The scaling benchmark: it runs, and a layout that disagrees fails it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import scaling as bench
from tools.bench.parts import short_runs
from tools.bench.parts.profiling import length_of_union

RUN = {
    "losses": [5.0, 4.5], "seconds": [9.0, 9.0, 9.0, 2.0, 4.0, 3.0], "tokens": 600,
    "samples": "a", "parameters": 2e9, "memory": 1.0, "hardware": "X", "torch": "0",
}  # fmt: skip


def _results(args) -> dict[str, dict]:
    return {name: dict(RUN) for jobs in bench.make_jobs(args).values() for name in jobs}


def test_tables_of_made_up_results() -> None:
    args = bench.parse(["--ranks", "2"])
    results = _results(args)
    results["scaling/fst/tp 2, sp"]["seconds"] = [9.0, 9.0, 9.0, 1.5, 1.5, 1.5]
    text, good = bench.report(results, args)
    assert good
    assert "| one | 1 | 200 | 100% | 200 | 100% | 1.00 |" in text
    assert "| tp 2, sp | 2 | 200 | 50% | 400 | 100% | 2.00 |" in text
    assert "tp 4" not in text  # two GPUs only


@pytest.mark.parametrize(("key", "value"), [("losses", [5.0, 4.6]), ("samples", "b")])
def test_a_layout_that_disagrees_fails(key: str, value) -> None:
    args = bench.parse(["--ranks", "2", "--part", "matrix"])
    results = _results(args)
    assert bench.report(results, args)[1]
    results["matrix/fst/pp 2"][key] = value
    text, good = bench.report(results, args)
    assert not good and text.count("FAILED") == 1


def test_it_runs_on_cpu(tmp_path: Path) -> None:
    output = tmp_path / "scaling.md"
    flags = ["--device", "cpu", "--tiny", "--ranks", "1", "--part", "matrix", "--matrix-steps", "2"]
    assert bench.main([*flags, "--output", str(output)]) == 0
    assert output.read_text().count(" ok |") == 6  # one, micro-batch 1, recompute full; dense, fst
    assert list(tmp_path.iterdir()) == [output]


def test_time_of_a_step_is_divided() -> None:
    args = bench.parse(["--ranks", "2", "--part", "scaling"])
    results = _results(args)
    assert "communication alone" not in bench.report(results, args)[0]  # as on CPUs
    for run in results.values():
        run |= {"computing": 1.5, "covered": 2.25}
    text, _ = bench.report(results, args)
    assert "| tp 2, sp | 2 | fst | 3000 | 1500 (50%) | 750 (25%) | 750 (25%) |" in text


def test_spans_that_overlap_count_once() -> None:
    spans = [(4.0, 6.0), (0.0, 2.0), (1.0, 3.0), (4.5, 5.0), (6.0, 7.0)]
    assert length_of_union(spans) == 6.0
    assert length_of_union([]) == 0.0


def test_what_was_measured_is_not_run_again(tmp_path, monkeypatch) -> None:
    started = []

    def start(jobs, ranks, device, place, gpus):
        started.append((list(jobs), gpus))
        for name, job in jobs.items():
            kept = json.dumps({"job": job, "result": {"loss": len(started)}})
            short_runs._file(place, name).write_text(kept)

    monkeypatch.setattr(short_runs, "_start", start)
    jobs = {name: {"flags": [name], "steps": 2} for name in ("a/one", "a/two, sp")}
    folder = tmp_path / "x.runs"
    first = short_runs.launch({"a/one": jobs["a/one"]}, 1, "cpu", folder)
    assert first == {"a/one": {"loss": 1}}
    assert short_runs.launch(jobs, 1, "cpu", folder, ["3"]) == {**first, "a/two, sp": {"loss": 2}}
    jobs["a/one"]["steps"] = 3  # another job
    short_runs.launch(jobs, 1, "cpu", folder)
    assert started == [(["a/one"], ()), (["a/two, sp"], ["3"]), (["a/one"], ())]


def test_more_ranks_than_gpus_are_refused_but_for_the_matrix(monkeypatch, tmp_path) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for flags in ([], ["--share-gpus"], ["--part", "matrix"]):
        with pytest.raises(SystemExit, match="--ranks 4, found 2 GPUs"):
            bench.main(["--ranks", "4", *flags])
    launched = []

    def launch(jobs, ranks, device, folder, gpus):
        launched.append((ranks, gpus, len(jobs)))
        folder.mkdir(exist_ok=True)
        return {name: dict(RUN) for name in jobs}

    monkeypatch.setattr(bench, "launch", launch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    flags = ["--part", "matrix", "--share-gpus", "--ranks", "4", "--layouts", "tp 4", "dp 2"]
    assert bench.main([*flags, "--output", str(tmp_path / "x.md")]) == 0
    assert launched == [(1, ["5"], 2), (2, ["5", "7"], 2), (4, ["5", "7"], 2)]
    assert "# Layouts on 2 x X, shared by 4 ranks" in (tmp_path / "x.md").read_text()


def test_a_rank_takes_its_gpu_and_says_that_it_is_a_host_of_its_own(monkeypatch) -> None:
    taken = []
    for rank in range(4):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        monkeypatch.setattr(short_runs.os, "environ", environment)
        short_runs._take_gpu(["5", "7"])
        taken.append([environment[name] for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK")])
    assert taken == [["5", "0"], ["7", "0"], ["5", "0"], ["7", "0"]]
    assert environment["NCCL_HOSTID"] == "rank-3"
