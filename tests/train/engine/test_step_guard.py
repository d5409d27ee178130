"""A NaN or an infinity: the step changes nothing, and the message names the culprit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from megasparse.checkpoint.directory import list_steps
from megasparse.metrics.schema import read_metrics
from tests import dist, forked
from tests.reliability.runs import flags

VARIABLE = "MEGASPARSE_FAULT"
PP2 = ["--pipeline-model-parallel-size", "2"]


def _run(tmp_path: Path, dataset: str, fault: str, *more: str, world: int = 2):
    log = tmp_path / "log"
    run = flags(dataset, tmp_path / "run", *more)
    codes = forked.run(run, world, log, {VARIABLE: fault})
    return codes, [Path(f"{log}.{rank}").read_text() for rank in range(world)]


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_rank_micro_batch_and_samples_of_a_bad_loss_are_named(tmp_path, dataset, kind):
    codes, texts = _run(tmp_path, dataset, f"{kind}@1:6:loss", "--global-batch-size", "8")
    assert codes == [70, 70]
    samples = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(samples) == 6
    for text in texts:
        assert f"step 7: a loss that is not finite; the loss is {kind} on rank 1" in text
        assert "micro-batch 0, samples 0:" in text and "no update was made" in text


@pytest.mark.parametrize(
    "more",
    [[], ["--bf16"], ["--bf16", "--zero-stage", "3"], ["--tensor-model-parallel-size", "2"], PP2],
)
def test_the_tensor_of_a_bad_gradient_is_named(tmp_path, dataset, more):
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    codes, texts = _run(tmp_path, dataset, f"nan@1:6:grad/{name}", *more)
    assert codes == [70, 70]
    for text in texts:
        assert f"the gradient of {name} is not finite on rank 1, micro-batch 0, samples 0:" in text


@pytest.mark.parametrize("fault", ["nan@1:6:loss", "nan@0:6:grad/layers.0.mlp.linear_fc2.weight"])
def test_a_pipeline_names_stage_micro_batch_and_samples(tmp_path, dataset, fault):
    codes, texts = _run(tmp_path, dataset, fault, *PP2, "--global-batch-size", "8")
    assert codes == [70, 70]
    stage = fault[4]
    for text in texts:
        assert "step 7: " in text and "no update was made" in text
        assert f" on rank {stage}, micro-batch 0, samples 0:" in text
        if fault.endswith("loss"):
            assert "a loss that is not finite; the loss is nan on rank 1" in text
        else:
            assert "the gradient of decoder.layers.0.mlp.linear_fc2.weight is not finite" in text


def test_a_pipeline_tells_a_transient_fault_and_skips_the_step(tmp_path, dataset):
    fault = "nan-once@1:6:loss"
    codes, texts = _run(tmp_path, dataset, fault, *PP2, "--max-skipped-steps", "1")
    assert codes == [0, 0] and "computed again it was finite: a transient fault" in texts[0]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["loss"] is None] == [7] and len(rows) == 20


def test_a_transient_fault_is_told_from_a_lasting_one(tmp_path, dataset):
    codes, texts = _run(tmp_path, dataset, "nan-once@0:6:loss", world=1)
    assert codes == [70] and "computed again it was finite: a transient fault" in texts[0]


def test_steps_are_skipped_as_often_as_allowed(tmp_path, dataset):
    fault = "nan@0:6:loss,inf@0:9:loss"
    codes, texts = _run(tmp_path, dataset, fault, "--max-skipped-steps", "1")
    assert codes == [0, 0]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["loss"] is None] == [7, 10]
    assert len(rows) == 20 and "skipped (1 in a row, 1 allowed)" in texts[0]
    assert list_steps(tmp_path / "run" / "checkpoints") == [20]


def test_two_in_a_row_are_one_too_many(tmp_path, dataset):
    fault = "nan@0:6:loss,inf@0:7:loss"
    codes, _ = _run(tmp_path, dataset, fault, "--max-skipped-steps", "1", world=1)
    assert codes == [70]


def _state_around_a_bad_step(rank: int, world: int, run: list[str], point: str) -> list[Any]:
    """Digests of everything before and after a step with a NaN."""
    from megasparse.config import load_config, resolve
    from megasparse.distributed.control_plane import make_control_plane
    from megasparse.distributed.events import Events
    from megasparse.distributed.faults import Faults, parse
    from megasparse.distributed.signals import StopRequest
    from megasparse.megatron.data.batches import batches, build_data
    from megasparse.megatron.grid import make_grid
    from megasparse.train import checkpoint
    from megasparse.train.engine.deepspeed import start_process
    from megasparse.train.engine.step_guard import NonFiniteStep
    from megasparse.train.loop import RunServices, Trainer

    config = resolve(load_config(run), world)
    device = start_process(1.0)
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    grid = make_grid(tp, device, config.train.seed, pipeline_model_parallel_size=pp)
    # At step 4 masks are refreshed as well: they must come back too.
    faults = Faults(parse(f"nan@*:4:{point}"), rank)
    services = RunServices(make_control_plane(), StopRequest(), Events(faults.passed), faults)
    trainer = Trainer(config, grid, build_data(config, grid), services)
    stream = batches(trainer.data.streams["train"], config, grid, 0)

    def digests() -> dict[str, str]:
        return {
            name: hashlib.sha256(value.detach().contiguous().cpu().view(-1).numpy()).hexdigest()
            if value.dtype.itemsize != 2
            else repr(value.tolist())
            for name, (_, value) in checkpoint.collect(trainer.engine).items()
        }

    for _ in range(4):
        trainer.engine.train_step(stream)
    before = digests()
    try:
        trainer.engine.train_step(stream)
        return ["no error"]
    except NonFiniteStep:
        after = digests()
    changed = [name for name in before if before[name] != after.get(name)]
    # And the guard lets good steps through: the next one does change the weights.
    trainer.controller.clock.step += 1
    trainer.engine.train_step(stream)
    moved = sum(before.get(name) != value for name, value in digests().items())
    return [*changed, *(after.keys() ^ before.keys()), moved > len(before) // 2]


@pytest.mark.parametrize("point", ["loss", "grad/linear_fc2"])
@pytest.mark.parametrize(
    ("world", "more"),
    [
        (1, []),
        (2, ["--bf16"]),
        (2, ["--bf16", "--zero-stage", "3"]),
        (2, PP2),
        (2, [*PP2, "--bf16"]),
        (1, ["--sparsity-recipe", "s_ste", "--masked-decay", "none"]),
    ],
    ids=["fst", "zero1-bf16", "zero3-bf16", "pp2", "pp2-bf16", "s_ste"],
)
def test_a_bad_step_changes_nothing(tmp_path, dataset, world, more, point):
    run = flags(dataset, tmp_path / "run", *more)
    for result in dist.run(_state_around_a_bad_step, world, run, point):
        assert result == [True], result
