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
    rank: int, world: int, run: list[str], fault: str | None, step: int
) -> list[dict[str, str]]:
    """Digests of the whole state after every step.

    Args:
        fault: kind and point that end step `step`; None: this run does not compute that step.
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
        grid = make_grid(config.parallel.tensor_model_parallel_size, device, config.train.seed)
        kind, _, point = (fault or "nan:nowhere").partition(":")
        faults = Faults(parse(f"{kind}@*:{step}:{point}") if fault else [], rank)
        services = RunServices(make_control_plane(), StopRequest(), Events(faults.passed), faults)
        trainer = Trainer(config, grid, build_data(config, grid), services)
        stream = batches(trainer.data.streams["train"], config, grid, 0)
        clock, states = trainer.controller.clock, []
        trainer.controller.ask(True)
        for number in range(STEPS):
            if number == step and fault is None:
                for _ in range(trainer.engine.layout.accumulation_steps):
                    next(stream)
                clock.step += 1
            else:
                try:
                    trainer.engine.train_step(stream)
                    assert number != step, f"{fault}: nothing was skipped"
                except NonFiniteStep:
                    assert number == step
                    clock.step += 1
            states.append(_state(trainer))
        trainer.folder.release()
        return states


def _state(trainer: Any) -> dict[str, str]:
    from megasparse.train import checkpoint

    tensors = {name: v for name, (_, v) in checkpoint.collect(trainer.engine).items()}
    fp8, rest = trainer.controller.fp8, {}
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
# All kinds of faults where there is most to put back, the hardest one elsewhere. What a first step
# makes (masks, scales) must be unmade.
CASES = [
    *((name, "huge:loss", 4) for name in RUNS),
    *((name, "huge:loss", 0) for name in ("fst", "s_ste", "ast, wanda", "fst, fp8")),
    *(("fst, fp8", fault, 4) for fault in ("nan:loss", "inf:loss", "huge:grad/linear_fc2")),
    ("ast, wanda", "nan:loss", 4),
]


@pytest.fixture(scope="module")
def never_saw(dataset, tmp_path_factory):
    """States of a run that does not compute a step, made once for each run and step."""
    root, known = tmp_path_factory.mktemp("never"), {}

    def states(name, step):
        if (name, step) not in known:
            run, world = RUNS[name]
            folder = root / f"{len(known)}"
            known[name, step] = dist.run(
                _states_after_each_step, world, flags(dataset, folder, *run), None, step
            )
        return known[name, step]

    return states


@pytest.mark.parametrize(("name", "fault", "step"), CASES)
def test_a_skipped_step_leaves_nothing(tmp_path, dataset, never_saw, name, fault, step):
    run, world = RUNS[name]
    run = flags(dataset, tmp_path / "run", *run)
    found = dist.run(_states_after_each_step, world, run, fault, step)
    for mine, expected in zip(found, never_saw(name, step), strict=True):
        for number, (a, b) in enumerate(zip(mine, expected, strict=True)):
            assert sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)) == [], number
