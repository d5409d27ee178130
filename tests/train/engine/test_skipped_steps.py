"""A step that is skipped leaves nothing: everything is as in a run that never saw it."""

from __future__ import annotations

import hashlib
from typing import Any
from unittest import mock

import pytest
import torch

from tests import dist
from tests.parallel.test_fp8 import CURRENT, FP8, FST, S_STE, WIDE
from tests.reliability.runs import flags

STEPS = 6  # masks are refreshed at steps 0 and 4; the history of amax is 3 steps


def _states_after_each_step(
    rank: int, world: int, run: list[str], skipped: dict[int, str], injected: bool
) -> list[dict[str, str]]:
    """Digests of the whole state after every step.

    Args:
        skipped: kind and point of the fault that ends each of some steps.
        injected: by them; else this run does not compute those steps.
    """
    from megasparse.config import load_config, resolve
    from megasparse.distributed.control_plane import make_control_plane
    from megasparse.distributed.events import Events
    from megasparse.distributed.faults import Faults, parse
    from megasparse.distributed.signals import StopRequest
    from megasparse.megatron.data.batches import batches, build_data
    from megasparse.megatron.grid import make_grid
    from megasparse.train.engine.deepspeed import start_process
    from megasparse.train.engine.step_guard import NonFiniteStep
    from megasparse.train.loop import RunServices, Trainer

    with mock.patch("megasparse.fp8.transformer_engine.refusal", return_value=None):
        config = resolve(load_config(run), world)
        device = start_process(1.0)
        parallel = config.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        grid = make_grid(tp, device, config.train.seed, pipeline_model_parallel_size=pp)
        wanted = [(step, *fault.split(":", 1)) for step, fault in skipped.items() if injected]
        text = ",".join(f"{kind}@*:{step}:{point}" for step, kind, point in wanted)
        faults = Faults(parse(text), rank)
        services = RunServices(make_control_plane(), StopRequest(), Events(faults.passed), faults)
        trainer = Trainer(config, grid, build_data(config, grid), services)
        stream = batches(trainer.data.streams["train"], config, grid, 0)
        clock, states = trainer.controller.clock, []
        trainer.controller.ask(True)
        for number in range(STEPS):
            if number in skipped and not injected:
                for _ in range(trainer.engine.layout.accumulation_steps):
                    next(stream)
                clock.batch = config.train.global_batch_size
                clock.advance()
            else:
                try:
                    trainer.engine.train_step(stream)
                    assert number not in skipped, f"{skipped[number]}: nothing was skipped"
                except NonFiniteStep:
                    assert number in skipped
                    clock.advance()
            states.append(_state(trainer))
        return states


def _state(trainer: Any) -> dict[str, str]:
    from megasparse.train import checkpoint

    tensors = {name: v for name, (_, v) in checkpoint.collect(trainer.engine).items()}
    clock = trainer.controller.clock
    fp8, rest = trainer.controller.fp8, {"clock": (clock.step, clock.samples)}
    for state, _ in trainer.controller.weights:
        rest[state.name] = (
            state.last_refresh,
            state.refreshes,
            state.prepared_step,
            state.preparations_of_step,
            state.preparations,
            None if state.inputs is None else state.inputs.tokens,
        )
    if hasattr(fp8, "history"):
        tensors |= {"history": fp8.history, "scale": fp8.scale, "scale_inv": fp8.scale_inv}
        rest["fp8"] = (fp8.initialized, fp8.assumed)
    digests = {
        name: hashlib.sha256(
            value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        ).hexdigest()
        for name, value in tensors.items()
        if value.numel()
    }
    return digests | {name: repr(value) for name, value in rest.items()}


FP8_RUN = [*WIDE, "--hidden-dropout", "0.1", "--save-interval", "none"]
RUNS = {
    # name: (flags, ranks)
    "fst": ([], 1),
    "fst, zero 1": (["--bf16"], 2),
    "fst, zero 3": (["--bf16", "--zero-stage", "3"], 2),
    "fst, pp 2": (["--pipeline-model-parallel-size", "2"], 2),
    "fst, tp 2": (["--tensor-model-parallel-size", "2"], 2),
    "s_ste": (["--sparsity-recipe", "s_ste", "--masked-decay", "none"], 1),
    "s_ste, scale of every step": (
        ["--sparsity-recipe", "s_ste", "--masked-decay", "none", "--s-ste-scale", "every_step"], 1,
    ),
    "ast, wanda": (["--sparsity-recipe", "ast", "--mask-metric", "wanda"], 1),
    "fst, fp8": ([*FP8_RUN, *FP8, *FST], 1),
    "fst, fp8, tp 2": ([*FP8_RUN, *FP8, *FST, "--tensor-model-parallel-size", "2"], 2),
    "s_ste, fp8": ([*FP8_RUN, *FP8, *S_STE, "--masked-decay", "none"], 1),
    "fst, current scaling": ([*FP8_RUN, *CURRENT, *FST], 1),
}  # fmt: skip
# All kinds of faults in every run, by turns: in the first step, which makes masks and scales that
# must be unmade, in one between, and in one whose masks are refreshed.
KINDS = ("huge:loss", "nan:loss", "inf:loss")
CASES = {
    name: {step: KINDS[(number + turn) % 3] for turn, step in enumerate((0, 2, 4))}
    for number, name in enumerate(RUNS)
}
# Of gradients alone, after a finite loss.
GRADIENTS = {1: "huge:grad/linear_fc2", 3: "inf:grad/linear_qkv", 4: "nan:grad/linear_fc2"}


@pytest.mark.parametrize(
    ("name", "skipped"),
    [*CASES.items(), ("fst, fp8", GRADIENTS), ("ast, wanda", GRADIENTS)],
    ids=[*CASES, "fst, fp8, gradients", "ast, wanda, gradients"],
)
def test_a_skipped_step_leaves_nothing(tmp_path, dataset, name, skipped):
    run, world = RUNS[name]
    found, never_saw = (
        dist.run(
            _states_after_each_step, world, flags(dataset, tmp_path / how, *run), skipped, injected
        )
        for how, injected in (("injected", True), ("never", False))
    )
    for mine, expected in zip(found, never_saw, strict=True):
        for number, (a, b) in enumerate(zip(mine, expected, strict=True)):
            assert sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)) == [], number
