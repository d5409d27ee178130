"""Context parallelism and the pipeline's bubble in the estimates: formulas against counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megasparse.config import load_config, resolve
from megasparse.config.resolved import ResolvedConfig
from megasparse.estimate import context
from megasparse.estimate.bubble import bubble_fraction
from megasparse.estimate.flops import of_run
from megasparse.estimate.gemm_table import GemmTable
from megasparse.estimate.memory import footprint
from megasparse.estimate.time import step_time
from megasparse.sparsity.run_recipe import recipe_of

ROOT = Path(__file__).parents[2]
TABLE = GemmTable(ROOT / "tools" / "results" / "gemm-h200.json")
LONG = [
    "--num-layers", "4", "--hidden-size", "1024", "--ffn-hidden-size", "4096", "--swiglu",
    "--num-attention-heads", "16", "--num-query-groups", "4", "--seq-length", "32768", "--bf16",
    "--vocab-size", "1024", "--mock-data", "--global-batch-size", "8", "--zero-stage", "1",
]  # fmt: skip
WORLD = 4


def _config(*flags: str) -> ResolvedConfig:
    return resolve(load_config([*LONG, *flags]), WORLD)


def test_context_parallel_ranks_are_replicas_with_a_share_of_the_tokens():
    whole, shared = _config(), _config("--context-parallel-size", "4")
    recipe = recipe_of(whole)
    one, four = (footprint(config, recipe, 1024, WORLD) for config in (whole, shared))
    assert one.state == four.state
    assert four.transient["activations"] == pytest.approx(
        one.transient["activations"] / 4, rel=0.01
    )
    received = context.buffers(shared)
    assert four.transient["workspace"] - received == one.transient["workspace"] / 4
    assert of_run(whole, 1024, recipe) == of_run(shared, 1024, recipe)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
def test_what_is_exchanged(ranks, kind):
    config = _config("--context-parallel-size", str(ranks), "--cp-comm-type", kind)
    own = 2 * 2 * (32768 // ranks) * 4 * 64  # K and V, 2 bytes, tokens, groups, channels
    assert context.keys_and_values(config) == own
    # Forward and backward, those of a rank go to every other; so do the gradients of theirs.
    assert context.exchanged(config) == 3 * (ranks - 1) * own
    assert context.buffers(config) == {"p2p": 4 * own, "all_gather": 2 * ranks * own}[kind]
    hidden = context.exposed_seconds(config, 1.0, 1.0)
    assert hidden == pytest.approx({"p2p": 1 / ranks, "all_gather": 1.0}[kind])
    parts = step_time(config, recipe_of(config), 1024, WORLD, TABLE).parts
    assert ("context parallel" in parts) and parts["attention"] > 0


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (4, 8), (3, 7)])
def test_the_bubble_is_that_of_deepspeeds_schedule(stages, micro_batches):
    from megasparse.train.engine.deepspeed import schedule

    turns, idle = 0, 0
    for stage in range(stages):
        for commands in schedule.TrainSchedule(micro_batches, stages, stage).steps():
            works = (schedule.ForwardPass, schedule.BackwardPass)
            turns += 1
            idle += not any(isinstance(command, works) for command in commands)
    assert idle / turns == pytest.approx(bubble_fraction(stages, micro_batches))


def test_the_documentation_shows_the_formulas():
    text = (ROOT / "docs" / "parallelism.md").read_text()
    rows = re.findall(r"^    (\d+) +(\d+)((?: +[\d.]+%){3})$", text, flags=re.M)
    assert len(rows) == 4
    for stages, micro_batches, shares in rows:
        shown = [f"{bubble_fraction(int(stages), int(micro_batches), v):.1%}" for v in (1, 2, 4)]
        assert shares.split() == shown


def test_virtual_stages_shrink_the_bubble():
    assert bubble_fraction(1, 8) == 0
    assert bubble_fraction(4, 8, 2) == bubble_fraction(4, 16) < bubble_fraction(4, 8)
