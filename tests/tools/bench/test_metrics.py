"""The benchmark of the metrics' cost: it runs, at any size of the model."""

from __future__ import annotations

import os

from tests.forkserver import context
from tools.bench import metrics


def _bench(arguments: list[str]) -> None:
    os._exit(metrics.main(arguments))


def test_bench_metrics_runs_at_any_size(tmp_path):
    output = tmp_path / "metrics.md"
    flags = [
        "--rounds",
        "1",
        "--output",
        str(output),
        "--",
        "--num-layers",
        "1",
        "--hidden-size",
        "64",
        "--ffn-hidden-size",
        "64",
        "--seq-length",
        "32",
    ]
    process = context().Process(target=_bench, args=(flags,))
    process.start()
    process.join(200)
    assert process.exitcode in (0, 1)  # the cost of a toy is not judged
    text = output.read_text()
    assert "all metrics cost" in text and text.count("| plain |") == 1
