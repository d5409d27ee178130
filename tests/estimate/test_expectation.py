"""What is expected of 2:4 before a run, from measured rates."""

from __future__ import annotations

import re

import pytest

from megasparse.config import load_config, resolve
from megasparse.estimate.expectation import expectation, measured_table
from megasparse.sparsity.run_recipe import recipe_of

LLAMA = [
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu",
    "--disable-bias-linear",
]  # fmt: skip
LARGE = [
    *LLAMA, "--num-layers", "8", "--hidden-size", "4096", "--ffn-hidden-size", "14336",
    "--num-attention-heads", "32", "--seq-length", "4096", "--micro-batch-size", "1",
    "--global-batch-size", "4", "--sparse-layers", "*.mlp.*", "*.self_attention.linear_*",
]  # fmt: skip
SMALL = [
    *LLAMA, "--num-layers", "2", "--hidden-size", "256", "--num-attention-heads", "4",
    "--seq-length", "128", "--micro-batch-size", "1", "--global-batch-size", "1",
]  # fmt: skip


def _config(flags: list[str]):
    more = ["--bf16", "--mock-data", "--lr", "1e-3", "--train-iters", "10", "--vocab-size", "32000"]
    return resolve(load_config([*flags, *more, "--sparsity-recipe", "fst"]), 1)


def _expected(flags: list[str]):
    table = measured_table("NVIDIA H200")
    assert table is not None
    config = _config(flags)
    return expectation(config, recipe_of(config), 32000, 1, table)


def test_large_layers_gain_and_small_ones_do_not():
    large = _expected(LARGE)
    assert 1.1 < large.ratio < 1.5
    assert re.fullmatch(
        r"a step of the sparse phase is expected to take \d+ ms, with the recipe dense \d+ ms "
        r"\(1\.\d\d times as fast\)",
        large.describe(),
    )
    small = _expected(SMALL)
    # Both wait for the host alone, so the two are equal.
    assert small.ratio == pytest.approx(1.0, abs=1e-9)
    assert re.search(
        r": 2:4 does not pay here\. 2:4 GEMMs save -?\d+ ms, .* cost \d+ ms", small.describe()
    )


def test_without_graphs_a_step_is_not_faster():
    eager = _expected([*LARGE, "--cuda-graph-impl", "none"])
    captured = _expected(LARGE)
    assert eager.sparse.seconds > captured.sparse.seconds
    assert eager.dense.seconds > captured.dense.seconds


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "cpu"])
def test_other_gpus_have_no_rates(name):
    assert measured_table(name) is None


def test_the_log_warns_where_2_4_does_not_pay(monkeypatch):
    from megasparse.estimate import expectation as module

    lines: list[tuple[str, str]] = []
    for level in ("info", "warning"):
        note = lambda text, line, level=level: lines.append((level, text % line))  # noqa: E731
        monkeypatch.setattr(module.logger, level, note)
    for flags in (LARGE, SMALL):
        config = _config(flags)
        module.tell(config, recipe_of(config), 32000, 1, "NVIDIA H200")
        module.tell(config, recipe_of(config), 32000, 1, "NVIDIA L4")  # not measured
    assert [level for level, _ in lines] == ["info", "warning"]
    assert "does not pay" in lines[1][1]
