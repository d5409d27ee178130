"""Gradients of many BF16 micro-batches are added up, and reduced, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megasparse.train.engine.gradients import one_after_the_other
from tests import dist
from tests.runs import LLAMA

MICRO_BATCHES = 128
RUN = [
    *LLAMA, "--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64",
    "--num-attention-heads", "2", "--seq-length", "16", "--vocab-size", "128",
    "--micro-batch-size", "1", "--global-batch-size", str(MICRO_BATCHES), "--bf16",
    "--train-iters", "2", "--lr", "1e-3", "--clip-grad", "0", "--sparsity-recipe", "dense",
    "--eval-iters", "0",
]  # fmt: skip
TP2 = ["--tensor-model-parallel-size", "2"]
LAYOUTS = {
    "ZeRO 1": (1, []),
    "ZeRO 1, dp 2": (2, []),
    "ZeRO 2, dp 2": (2, ["--zero-stage", "2"]),
    "ZeRO 3, dp 2": (2, ["--zero-stage", "3"]),
    "tp 2": (2, TP2),
    "tp 2, sp": (2, [*TP2, "--sequence-parallel"]),
    "pp 2": (2, ["--pipeline-model-parallel-size", "2"]),
}


def _engine(flags: list[str], world: int) -> tuple[Any, Any]:
    """Of a run, with its data."""
    from megasparse.config import load_config, resolve
    from megasparse.megatron.data.batches import build_data
    from megasparse.megatron.grid import make_grid
    from megasparse.sparsity.run_recipe import recipe_of
    from megasparse.train.build import build_engine
    from megasparse.train.engine.deepspeed import start_process

    config = resolve(load_config(flags), world)
    parallel = config.parallel
    device = start_process(1.0)
    grid = make_grid(
        parallel.tensor_model_parallel_size,
        device,
        config.train.seed,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
    )
    data = build_data(config, grid)
    engine = build_engine(config, grid, recipe_of(config), config.model.vocab_size)
    return engine, data


def _gradients(
    rank: int, world: int, flags: list[str], by_layers: bool
) -> tuple[list[torch.Tensor], int]:
    """What the optimizer gets in two steps, and how many weights got none from autograd."""
    from megasparse.megatron.data.batches import batches

    engine, data = _engine(flags, world)
    if not by_layers:
        for state, _ in engine.controller.weights:
            state.total = None
        engine.layout.gradients.leave(())
    weights = [weight for _, weight in engine.controller.weights]
    asked: set[int] = set()
    for place, weight in enumerate(weights):
        weight.register_hook(lambda g, place=place: None if g is None else asked.add(place))
    found: list[torch.Tensor] = []

    def before_step(optimizer: torch.optim.Optimizer) -> bool:
        found.extend(fragment.of(fragment.tensor.grad).clone() for fragment in engine.fragments)
        return False

    engine.optimizer._before_step = before_step
    stream = batches(data.streams["train"], engine.config, engine.layout.grid, 0)
    for _ in range(2):
        engine.train_step(stream)
    return found, len(weights) - len(asked)


def _error(rank: int, world: int, flags: list[str]) -> float:
    """Of the gradient that the optimizer gets, to the sum of the micro-batches' in float64."""
    from megasparse.megatron.data.batches import batches

    engine, data = _engine(flags, world)
    config, grid = engine.config, engine.layout.grid
    sums: dict[str, torch.Tensor] = {}
    marked = set()
    for name, parameter in engine.model.named_parameters():
        if getattr(parameter, "sequence_parallel", False):
            marked.add(name)

        def add(gradient: torch.Tensor, name: str = name) -> None:
            value = gradient.double()
            sums[name] = sums[name] + value if name in sums else value

        parameter.register_hook(add)
    found: list[tuple[Any, torch.Tensor]] = []

    def before_step(optimizer: torch.optim.Optimizer) -> bool:
        here = {id(t) for group in optimizer.param_groups for t in group["params"]}
        for fragment in engine.fragments:
            if id(fragment.tensor) in here and fragment.tensor.grad is not None:
                found.append((fragment, fragment.of(fragment.tensor.grad).clone()))
        return False

    engine.optimizer._before_step = before_step
    engine.train_step(batches(data.streams["train"], config, grid, 0))
    assert found and sums
    wrong = right = 0.0
    for name in sorted(sums):
        expected = sums[name]
        torch.distributed.all_reduce(expected, group=grid.dp_group)
        expected /= grid.dp_size
        if name in marked:
            torch.distributed.all_reduce(expected, group=grid.tp_group)
        sums[name] = expected
    for fragment, gradient in found:
        expected = sums[fragment.name].reshape(-1)[fragment.start :][: fragment.length]
        wrong += float((gradient.double() - expected).square().sum())
        right += float(expected.square().sum())
    assert right > 0
    return (wrong / right) ** 0.5


@pytest.mark.parametrize(("world", "more"), LAYOUTS.values(), ids=LAYOUTS)
def test_sums_are_those_of_float64(dataset: str, world: int, more: list[str]) -> None:
    errors = dist.run(_error, world, [*RUN, *more, "--data-path", dataset])
    assert max(errors) < 1e-6


def test_in_bf16_they_are_far_from_it(dataset: str) -> None:
    """What the flag is for; and that the test above can fail."""
    off = "--no-accumulate-allreduce-grads-in-fp32"
    for stage in ("1", "2"):
        flags = [*RUN, off, "--zero-stage", stage, "--data-path", dataset]
        assert min(dist.run(_error, 1, flags)) > 1e-3


def test_buffers_are_the_gradients() -> None:
    first = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    second = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    buffers = one_after_the_other([[first, second]], torch.float32)
    for _ in range(2):
        buffers.begin_step()
        for _ in range(300):
            (first.sum() + (second * 2).sum()).backward()
        assert torch.equal(buffers.flat[0], torch.tensor([300.0] * 12 + [600.0] * 5))
        assert first.grad.data_ptr() == buffers.flat[0].data_ptr()
        first.grad = second.grad = None  # as DeepSpeed leaves them


def test_what_layers_add_up_themselves_is_not_zeroed():
    sizes = {"a": 3, "b": 4, "c": 2, "d": 5}
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    a, b, c, d = parameters.values()
    for taken in ([], [a], [b, c], [a, d], [d], [a, b, c, d]):
        buffers = one_after_the_other([[a, b, c], [d]], torch.float32)
        buffers.leave(taken)
        for flat in buffers.flat:
            flat.fill_(7)
        buffers.begin_step()
        for parameter, view in buffers.views.items():
            left = any(parameter is one for one in taken)
            assert (view == (7 if left else 0)).all() and parameter.grad is view


@pytest.mark.parametrize("recipe", [["fst"], ["s_ste", "--fp8-format", "e4m3"]], ids=["fst", "fp8"])
def test_layers_add_up_what_autograd_would(dataset: str, recipe: list[str]) -> None:
    """Bit for bit, over two steps; in the second the sums hold those of the first."""
    flags = [*RUN, "--global-batch-size", "4", "--data-path", dataset, "--hidden-size", "128"]
    flags += ["--ffn-hidden-size", "128", "--seq-length", "128", "--sparsity-recipe", *recipe]
    ((by_layers, taken),) = dist.run(_gradients, 1, flags, True)
    ((by_autograd, none),) = dist.run(_gradients, 1, flags, False)
    assert taken > 0 and none == 0 and len(by_layers) == len(by_autograd) > 2 * taken
    for ours, theirs in zip(by_layers, by_autograd, strict=True):
        assert torch.equal(ours, theirs) and ours.any()
