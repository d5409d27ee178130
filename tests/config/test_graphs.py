"""Which runs are captured in CUDA graphs, and what is said of the others."""

from __future__ import annotations

import pytest

from megasparse.config import load_config, resolve
from megasparse.config.graphs import graphs_refusal
from tests.runs import TINY

BASE = [*TINY, "--mock-data", "--bf16", "--seq-length", "128"]


def _refusal(*flags: str) -> str | None:
    return graphs_refusal(resolve(load_config([*BASE, *flags]), 2))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], None),
        (["--seq-length", "1024"], None),
        (["--seq-length", "1000"], "seq_length 1000 is no multiple of 128"),
        (["--seq-length", "64"], "seq_length 64 is no multiple of 128"),
        (["--seq-length", "64", "--transformer-impl", "local"], None),
        (["--seq-length", "64", "--no-bf16"], None),
        (["--cuda-graph-impl", "none"], "cuda_graph_impl is none"),
        (["--zero-stage", "3"], "ZeRO 3"),
        (["--zero-stage", "2"], None),
        (["--pipeline-model-parallel-size", "2"], None),
        (["--hidden-dropout", "0.1"], "dropout is 0.1"),
        (["--recompute-granularity", "selective"], "selective"),
        (["--recompute-granularity", "full"], None),
        (["--model-type", "bert", "--no-mock-data", "--data-path", "D"], "model_type is bert"),
        (["--num-experts", "4", "--disable-bias-linear"], None),
        (
            ["--num-experts", "4", "--disable-bias-linear", "--recompute-granularity", "full"],
            "how many tokens each expert gets",
        ),
        (
            ["--num-experts", "4", "--disable-bias-linear", "--pipeline-model-parallel-size", "2"],
            "a pipeline of layers with experts",
        ),
    ],
)
def test_reasons(flags, reason):
    found = _refusal(*flags)
    assert found == reason or (reason is not None and reason in (found or ""))
