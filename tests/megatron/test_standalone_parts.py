"""The parts of `sparsify_model`: which steps and draws are counted, and what optimizers hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.fp8 import CurrentScaling, DelayedScaling
from megasparse.megatron import sparsify as sparsify_module
from megasparse.megatron import standalone as module
from megasparse.megatron.standalone import AutomaticController, Sparsity
from megasparse.sparsity.automatic.run import Run
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.recipe import make_recipe


def _controller() -> AutomaticController:
    recipe, clock = make_recipe("fst"), Clock(7, 100)
    controller = AutomaticController(recipe, clock, run=Run(recipe, clock))
    controller.layers.extend([11, 12])
    return controller


def test_draws_are_numbered_by_the_passes_of_a_step():
    controller = _controller()
    run: Any = controller.run
    seeds: Any = [controller.seed(place) for place in (0, 1)]
    assert [seeds[0](), seeds[0](), seeds[1]()] == [
        run.seed(11, 0),
        run.seed(11, 1),
        run.seed(12, 0),
    ]
    before = run.seed(11, 0)
    controller.clock.step += 1
    assert seeds[0]() == run.seed(11, 0) != before
    assert seeds[0]() == run.seed(11, 1)


def test_steps_are_counted_by_optimizers():
    controller = _controller()
    run: Any = controller.run
    assert controller.steps_done == 0
    run.stepped = True
    assert controller.steps_done == 1
    controller.begin_forward()
    assert (controller.clock.step, run.stepped, controller.steps_done) == (1, False, 1)
    run.stepped = True
    controller.set_steps_done(5)
    assert (controller.clock.step, run.stepped, controller.steps_done) == (5, False, 5)


def _sparsity(monkeypatch, *weights: torch.nn.Parameter) -> Any:
    monkeypatch.setattr(module, "install", lambda updates, owner: [])
    layers: Any = {f"l{n}": SimpleNamespace(weight=weight) for n, weight in enumerate(weights)}
    return Sparsity(_controller(), layers), layers


def _held(*tensors: torch.Tensor) -> dict[int, torch.Tensor]:
    return {id(tensor): tensor for tensor in tensors}


MASK = torch.arange(12).view(3, 4) % 2 == 0


def test_an_optimizer_holds_a_weight_its_copy_or_a_piece_of_it(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    sparsity, layers = _sparsity(monkeypatch, weight)
    locate = lambda held: sparsity._locate("l0", layers["l0"], held)  # noqa: E731
    found = locate(_held(weight))
    assert found.tensor is weight and found.cut(MASK) is MASK
    piece = weight.detach().view(-1)[5:9]
    found = locate(_held(torch.zeros(4), piece))
    assert found.tensor is piece and torch.equal(found.cut(MASK), MASK.view(-1)[5:9])
    assert locate(_held(torch.zeros(4))) is None
    main = torch.zeros(12)
    weight.main_param = main  # type: ignore[attr-defined]
    found = locate(_held(main))
    assert found.tensor is main and torch.equal(found.cut(MASK), MASK.view(-1))
    assert locate(_held(torch.zeros(4))) is None


def test_pieces_of_16_bit_weights_have_to_be_attached(monkeypatch):
    first, second = (torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    sparsity, layers = _sparsity(monkeypatch, first, second)
    second.main_param_sharded = True  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"l0: .*expected sparsity.attach\(optimizer\)"):
        sparsity._locate("l0", layers["l0"], {})
    assert sparsity._locate("l0", layers["l0"], _held(first)).tensor is first
    ranges = {id(first): SimpleNamespace(start=2, end=7)}
    inner = SimpleNamespace(
        model_param_gbuf_map={first: 0},
        _get_model_param_range_map=lambda weight: {"param": ranges[id(weight)]},
    )
    sparsity.attach(SimpleNamespace(chained_optimizers=[SimpleNamespace(), inner]))
    main = torch.zeros(5)
    first.main_param = main  # type: ignore[attr-defined]
    found = sparsity._locate("l0", layers["l0"], _held(main))
    assert torch.equal(found.cut(MASK), MASK.view(-1)[2:7])
    assert sparsity._locate("l1", layers["l1"], _held(main)) is None
    alone, _ = _sparsity(monkeypatch, first)
    alone.attach(inner)  # one optimizer
    assert alone._ranges == {id(first): (2, 7)}


def test_a_view_of_a_weight_begins_in_it_and_is_of_its_kind():
    flat = torch.zeros(20)
    weight = flat[4:16].view(3, 4)
    for start, stop, found in (
        (4, 8, (0, 4)),
        (15, 16, (11, 12)),
        (16, 20, None),
        (0, 4, None),
        (8, 8, None),
    ):
        target = module._view_of(weight, _held(flat[start:stop]))
        if found is None:
            assert target is None, (start, stop)
        else:
            assert target is not None
            assert torch.equal(target.cut(MASK), MASK.view(-1)[slice(*found)])
    assert module._view_of(weight, _held(flat.view(torch.int32)[4:8])) is None


class Layer(torch.nn.Module):
    """One of a chunk, with Megatron's number of it in the whole model."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.fc1 = torch.nn.Linear(2, 2)


class Wrapped(torch.nn.Module):
    """As data parallelism wraps a model."""

    def __init__(self, module_: torch.nn.Module) -> None:
        super().__init__()
        self.module = module_


def test_layers_of_chunks_have_their_numbers_in_the_whole_model():
    def chunk(*numbers: int) -> torch.nn.Module:
        model = torch.nn.Module()
        model.decoder = torch.nn.Module()
        model.decoder.layers = torch.nn.ModuleList(Layer(number) for number in numbers)
        return model

    first, second = chunk(3, 4), chunk(7)
    second.head = torch.nn.Linear(2, 2)
    whole = module._Whole([Wrapped(Wrapped(first)), second])
    names = {name for name, one in whole.named_modules() if isinstance(one, torch.nn.Linear)}
    assert names == {*(f"decoder.layers.{n}.fc1" for n in (2, 3, 6)), "head"}
    assert module._bare(Wrapped(Wrapped(first))) is first


def test_scaling_is_of_the_kind_that_is_asked_for():
    cpu, largest = torch.device("cpu"), lambda tensor: tensor
    assert module._scaling(None, cpu, largest) is None
    assert isinstance(module._scaling("delayed", cpu, largest), DelayedScaling)
    assert isinstance(module._scaling("tensorwise", cpu, largest), CurrentScaling)
    with pytest.raises(ConfigError, match="fp8 'e4m3', expected None, 'delayed' or 'tensorwise'"):
        module._scaling("e4m3", cpu, largest)


@pytest.mark.parametrize(("size", "calls"), [(1, 0), (2, 1)])
def test_reductions_ask_a_group_of_more_than_one(monkeypatch, size, calls):
    asked: list[Any] = []
    monkeypatch.setattr(module.dist, "all_reduce", lambda *a, **k: asked.append((a[1:], k)))
    group = SimpleNamespace(size=lambda: size)
    tensor = torch.ones(1)
    assert module._sum(group)(tensor) is tensor and module._largest(group)(tensor) is tensor
    assert (
        asked
        == [((), {"group": group}), ((torch.distributed.ReduceOp.MAX,), {"group": group})][
            : 2 * calls
        ]
    )


def test_patterns_are_looked_up_in_all_layers_of_the_model():
    names: Any = {"decoder.layers.1.mlp.fc1": None, "head.layers": None}
    found = sparsify_module._in_all(names, 3)
    assert found == {*(f"decoder.layers.{n}.mlp.fc1" for n in range(3)), "head.layers"}
    assert sparsify_module._in_all(names, 0) == set(names)
    assert sparsify_module._kinds(names) == ["*.head.layers", "*.mlp.fc1"]


@pytest.mark.parametrize(
    ("rows", "columns", "parts", "cut"),
    [(8, 4, 1, False), (8, 4, 2, False), (4, 4, 2, True), (6, 4, 1, True), (8, 6, 1, True)],
)
def test_a_shard_that_cuts_a_block_is_refused(rows, columns, parts, cut):
    from megasparse.sparsity.shard import WeightShard

    layer: Any = SimpleNamespace(shard=WeightShard((2 * rows, columns), 0, 0, 2, parts))
    if not cut:
        sparsify_module._check_blocks("l", layer)
        return
    with pytest.raises(ConfigError, match=f"l: a shard of {rows} x {columns} .*{parts} fused"):
        sparsify_module._check_blocks("l", layer)


def test_names_of_added_parameters_are_known():
    model = torch.nn.Module()
    for name in ("slorb_adapter", "slorb_projection", "weight_scale", "weight"):
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    inner = torch.nn.Module()
    inner.layer = model
    expected = {f"layer.{n}" for n in ("slorb_adapter", "slorb_projection", "weight_scale")}
    assert sparsify_module.low_rank_weight_names(inner) == expected
    assert sparsify_module.initial_low_rank_weights(inner) == []
