"""The scaling benchmark: it runs, and a layout that disagrees fails it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import bench_scaling

    yield bench_scaling
    sys.modules.pop("bench_scaling", None)


def _results(bench: ModuleType, args) -> dict[str, dict]:
    run = {
        "losses": [5.0, 4.5], "seconds": [9.0, 9.0, 9.0, 2.0, 4.0, 3.0], "tokens": 600,
        "samples": "a", "parameters": 2e9, "memory": 1.0, "hardware": "X", "torch": "0",
    }  # fmt: skip
    return {name: dict(run) for jobs in bench.make_jobs(args).values() for name in jobs}


def test_tables_of_made_up_results(bench: ModuleType) -> None:
    args = bench.parse(["--ranks", "2"])
    results = _results(bench, args)
    results["scaling/fst/tp 2, sp"]["seconds"] = [9.0, 9.0, 9.0, 1.5, 1.5, 1.5]
    text, good = bench.report(results, args)
    assert good
    assert "| one | 1 | 200 | 100% | 200 | 100% | 1.00 |" in text
    assert "| tp 2, sp | 2 | 200 | 50% | 400 | 100% | 2.00 |" in text
    assert "tp 4" not in text  # two GPUs only


@pytest.mark.parametrize(("key", "value"), [("losses", [5.0, 4.6]), ("samples", "b")])
def test_a_layout_that_disagrees_fails(bench: ModuleType, key: str, value) -> None:
    args = bench.parse(["--ranks", "2", "--part", "matrix"])
    results = _results(bench, args)
    assert bench.report(results, args)[1]
    results["matrix/fst/pp 2"][key] = value
    text, good = bench.report(results, args)
    assert not good and text.count("FAILED") == 1


@pytest.mark.slow
def test_it_runs_on_cpu(bench: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "scaling.md"
    flags = ["--device", "cpu", "--tiny", "--ranks", "1", "--matrix-steps", "2"]
    assert bench.main([*flags, "--warmup", "1", "--steps", "1", "--output", str(output)]) == 0
    text = output.read_text()
    assert "| recompute full | 1 | fst |" in text and "| one | 1 |" in text
