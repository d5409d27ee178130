"""The benchmark of --deterministic-mode: it runs, and a run that does not repeat fails it."""

from __future__ import annotations

from pathlib import Path

from tests import dist
from tools.bench import deterministic as bench


def _run(losses: list[float], second: float) -> dict:
    return {
        "losses": losses,
        "seconds": [9.0] * 5 + [second] * 3,
        "tokens": 600,
        "parameters": 2e6,
        "hardware": "X",
        "torch": "0",
    }


def test_table_of_made_up_results() -> None:
    args = bench.parse(["--only", "fst"])
    same, other = _run([4.0, 3.0, 2.0], 3.0), _run([4.0, 3.0, 2.5], 3.0)
    slow = _run([4.0, 3.0, 2.0], 4.0)
    results = {"fst": (same, other), "fst, deterministic": (slow, slow)}
    text, good = bench.report(results, args)
    assert good
    assert "| fst | from step 3, by 2.0e-01 | the same bits | 200 | 150 | 0.75 |" in text
    text, good = bench.report(results | {"fst, deterministic": (same, other)}, args)
    assert not good and text.count("from step 3") == 2


def _measure(rank: int, world: int, jobs: dict[str, dict]) -> dict[str, dict]:
    from tools.bench.parts.short_runs import measure

    return {name: measure(**job) for name, job in jobs.items()}


def test_it_runs_on_cpu(tmp_path: Path, monkeypatch) -> None:
    def launch(jobs, ranks, device):  # without torch's launcher, which takes seconds to start
        assert device == "cpu"
        return dist.run(_measure, ranks, jobs)[0]

    monkeypatch.setattr(bench, "launch", launch)
    output = tmp_path / "deterministic.md"
    flags = ["--device", "cpu", "--tiny", "--steps", "6", "--only", "fst"]
    assert bench.main([*flags, "--output", str(output)]) == 0
    assert "| fst | the same bits | the same bits |" in output.read_text()
