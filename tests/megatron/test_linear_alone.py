"""Parallel linears with stand-ins for their group: biases, marks, and which GEMMs compute them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megasparse.megatron import parallel_linear as module
from megasparse.megatron.comm.linear import GatherOverSequence, SumOverTensorParallel
from megasparse.megatron.parallel_linear import (
    ParallelLinear,
    SparseColumnParallelLinear,
    SparseRowParallelLinear,
)
from megasparse.sparsity.autograd.linear import NoComm
from tests.megatron.test_sequence_parts import Group

COLUMN, ROW = SparseColumnParallelLinear, SparseRowParallelLinear


@pytest.fixture(autouse=True)
def _no_groups(monkeypatch):
    monkeypatch.setattr(
        module, "get_tensor_model_parallel_group_if_none", lambda group, **_: group or Group(0, 1)
    )
    _recorded(monkeypatch, 1)


def _linear(kind, inputs=8, outputs=12, world=1, sequence_parallel=False, **more) -> Any:
    config = SimpleNamespace(
        sequence_parallel=sequence_parallel, use_cpu_initialization=True, params_dtype=torch.float64
    )
    layer = kind(inputs, outputs, config=config, tp_group=Group(world - 1, world), **more)
    with torch.no_grad():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("kind", [COLUMN, ROW])
@pytest.mark.parametrize(("bias", "skip"), [(True, False), (True, True), (False, False)])
def test_a_bias_is_added_or_given_away_or_not_there(kind, bias, skip):
    layer = _linear(kind, bias=bias, skip_bias_add=skip)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    z, given = layer(x)
    expected = torch.nn.functional.linear(x, layer.weight, None if skip else layer.bias)
    torch.testing.assert_close(z, expected)
    assert given is (layer.bias if skip else None)
    assert (layer.bias is not None) == bias and layer.weight.dtype == torch.float64


@pytest.mark.parametrize("kind", [COLUMN, ROW])
def test_a_linear_has_a_bias_that_it_adds_unless_told_otherwise(kind):
    layer = _linear(kind)
    assert layer.bias is not None and not layer.skip_bias_add
    assert layer.state is layer.dense is layer.controller is layer.profiled_as is None
    if kind is COLUMN:
        assert not layer.gather_output and layer.shard.parts == 1
    else:
        assert layer.input_is_parallel


@pytest.mark.parametrize("split", [False, True])
def test_marks_say_how_weight_and_bias_are_cut(split):
    column = _linear(COLUMN, 8, 16, 2, split, stride=2)
    for parameter in (column.weight, column.bias):
        assert parameter.tensor_model_parallel and parameter.partition_dim == 0
        assert parameter.partition_stride == 2
    assert column.weight.shape == (8, 8) and column.bias.shape == (8,)
    assert column.shard.rank == 1 and not hasattr(column.bias, "sequence_parallel")
    row = _linear(ROW, 8, 16, 2, split)
    assert row.weight.partition_dim == 1 and row.weight.shape == row.shard.local_shape == (16, 4)
    # Whole on every rank; with sequence parallelism of a part of the tokens.
    assert row.bias.sequence_parallel == split and row.bias.shape == (16,)
    assert not getattr(row.bias, "tensor_model_parallel", False)


@pytest.mark.parametrize(
    ("world", "split", "column"),
    [
        (1, False, NoComm),
        (1, True, NoComm),
        (2, False, SumOverTensorParallel),
        (2, True, GatherOverSequence),
    ],
)
def test_what_is_communicated_follows_from_the_layout(world, split, column):
    layer = _linear(COLUMN, world=world, sequence_parallel=split)
    assert type(layer.comm) is column and layer.sequence_parallel == (split and world > 1)
    assert type(_linear(ROW, world=world, sequence_parallel=split).comm) is GatherOverSequence


def _recorded(monkeypatch, factor: int = 10) -> list[str]:
    """Exchanges, which leave a multiple of the values."""
    calls: list[str] = []

    def exchange(name: str) -> Any:
        def run(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            calls.append(name)
            return x * factor

        return run

    names = ("gather_from", "scatter_to", "reduce_from")
    mappings = {f"{name}_tensor_model_parallel_region": exchange(name) for name in names}
    monkeypatch.setattr(module, "mappings", SimpleNamespace(**mappings))
    monkeypatch.setattr(module, "sum_over_sequence", exchange("sum_over_sequence"))
    return calls


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_row_adds_its_bias_once_to_the_sum(monkeypatch, split, parallel):
    calls = _recorded(monkeypatch)
    layer = _linear(ROW, 8, 12, 2, split, input_is_parallel=parallel)
    x = torch.randn(2, 1, 4, dtype=torch.float64)
    z, _ = layer(x)
    assert calls == [
        *(() if parallel else ("scatter_to",)),
        "sum_over_sequence" if split else "reduce_from",
    ]
    factor = 10 if parallel else 100
    torch.testing.assert_close(z, factor * (x @ layer.weight.t()) + layer.bias)


def test_a_column_gathers_its_results_if_they_are_wanted_whole(monkeypatch):
    calls = _recorded(monkeypatch)
    x = torch.randn(2, 1, 8, dtype=torch.float64)
    for gather in (False, True):
        layer = _linear(COLUMN, gather_output=gather)
        z, _ = layer(x)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(z, expected * (10 if gather else 1))
    assert calls == ["gather_from"]


def test_the_gemm_adds_a_bias_on_gpus_that_nobody_else_adds():
    def added(cuda: bool, skip: bool, fusion: bool | None) -> Any:
        config = SimpleNamespace() if fusion is None else SimpleNamespace()
        if fusion is not None:
            config.bias_activation_fusion = fusion
        layer: Any = SimpleNamespace(
            skip_bias_add=skip, config=config, bias="b", weight=SimpleNamespace(is_cuda=cuda)
        )
        return ParallelLinear.bias_of_gemm(layer)

    assert added(False, False, False) is None
    for skip, fusion in ((False, False), (False, True), (True, False), (True, None)):
        assert added(True, skip, fusion) == "b"
    assert added(True, True, True) is None
    with mock.patch.object(ParallelLinear, "bias_of_gemm", lambda _: "b"):
        assert _linear(ROW).bias_of_gemm() == "b"  # of one rank the sum is whole
        assert _linear(ROW, world=2).bias_of_gemm() is None


class Weight:
    """Stands for a sparsity state, or for the operands of a dense weight."""

    def __init__(self, dense_forward: bool = False) -> None:
        self.recipe = SimpleNamespace(dense_forward=dense_forward, name="ast")
        self.kept: list[int] = []
        self.quantizers, self.inputs = None, None

    def keep_mask(self, weight: Any, step: int) -> None:
        self.kept.append(step)

    def gemms(self, weight: Any, step: int, *phase: bool) -> tuple[Any, ...]:
        return ("gemms", weight, step, *phase)


def _step(layer: Any, sparse=True, monitor=False, calibrating=False) -> Any:
    begun: list[int] = []
    layer._controller = SimpleNamespace(
        clock=SimpleNamespace(step=7),
        sparse_now=sparse,
        monitor=monitor,
        calibrating=calibrating,
        begin_forward=lambda: begun.append(1),
        seed=lambda place: 100 + place,
    )
    found = layer._gemms_of_step(None)
    assert begun == [1]
    return found


def test_which_gemms_compute_a_step():
    layer = _linear(COLUMN)
    dense = module.DenseGemms
    gemms, seed = layer._gemms_of_step(None)  # of no controller
    assert type(gemms) is dense and gemms is not None and seed == 0
    assert type(_step(layer)[0]) is dense  # of a layer that stays dense
    layer.dense = Weight()
    assert _step(layer) == (("gemms", layer.weight, 7), 0)
    assert type(_step(layer, calibrating=True)[0]) is dense
    layer.dense, layer.state, layer._place = None, Weight(), 5
    for sparse, monitor in ((True, False), (False, True), (False, False)):
        found, seed = _step(layer, sparse, monitor)
        assert found == ("gemms", layer.weight, 7, sparse, monitor) and seed == 105
    assert type(_step(layer, calibrating=True)[0]) is dense
    _step(layer)
    assert layer._gemms_of_step("scaled")[0][1] == "scaled"
    layer._frozen = "frozen"
    assert layer._gemms_of_step(None) == ("frozen", 0)


@pytest.mark.parametrize(
    ("sparse", "monitor", "kept"),
    [(True, False, True), (False, True, True), (False, False, False), (True, True, True)],
)
def test_a_dense_forward_pass_keeps_its_mask_while_somebody_asks(sparse, monitor, kept):
    layer = _linear(COLUMN)
    layer.state = Weight(dense_forward=True)
    gemms, seed = _step(layer, sparse, monitor)
    assert type(gemms) is module.DenseGemms and seed == 0
    assert layer.state.kept == ([7] if kept else [])
    layer.eval()  # as it is used in the end
    assert _step(layer, sparse, monitor)[0][0] == "gemms"


@pytest.mark.parametrize(
    ("change", "alone"),
    [
        ({}, True),
        ({"quantizers": None}, False),
        ({"shape": (128, 8)}, False),
        ({"shape": (8, 128)}, False),
        ({"_branch": 1}, False),
        ({"inputs": 1}, False),
        ({"state": None}, True),
    ],
)
def test_a_layer_is_in_fp8_alone_where_nothing_wants_its_input(change, alone):
    given = {"quantizers": 1, "shape": (256, 128), "_branch": None, "inputs": None, **change}
    state = None if "state" in change else SimpleNamespace(inputs=given["inputs"])
    layer = SimpleNamespace(
        state=state,
        quantizers=given["quantizers"],
        _branch=given["_branch"],
        shard=SimpleNamespace(local_shape=given["shape"]),
    )
    assert ParallelLinear.in_fp8_alone.fget(layer) is alone  # type: ignore[attr-defined]


def test_a_print_of_the_model_says_what_is_sparse():
    layer = _linear(COLUMN, 8, 12, 2)
    assert layer.extra_repr() == "in=8, out=12, tp=2, dense"
    layer.state = Weight()
    layer.state.quantizers = object()
    assert layer.quantizers is layer.state.quantizers
    layer.add_low_rank_branch(4, False)
    assert layer.extra_repr() == "in=8, out=12, tp=2, ast 2:4 fp8 + rank 2"
    layer.dense = Weight()
    assert layer.quantizers is None
    controller: Any = SimpleNamespace(dense=[])
    layer.make_dense_fp8(layer.dense, controller)
    assert controller.dense == [(layer.dense, layer.weight)] and layer.controller is controller


@pytest.mark.parametrize("perform", [False, True, None])
def test_numbers_are_drawn_where_the_configuration_says_so(monkeypatch, perform):
    drawn: list[Any] = []
    monkeypatch.setattr(module, "initialize_by", lambda *a: drawn.append(a))
    config = SimpleNamespace(
        sequence_parallel=False, use_cpu_initialization=True, params_dtype=torch.float32
    )
    if perform is not None:
        config.perform_initialization = perform
    layer = COLUMN(8, 12, config=config, init_method=torch.nn.init.ones_)
    assert len(drawn) == (perform is True) and not layer.bias.any()
    assert hasattr(layer.weight, "partition_dim") == (perform is not True)
    assert COLUMN(8, 12, config=config).weight.partition_dim == 0 and len(drawn) == (
        perform is True
    )


@pytest.mark.parametrize("kind", [COLUMN, ROW])
@pytest.mark.parametrize("bias", [True, False])
def test_a_state_dict_has_the_parameters_and_the_states(monkeypatch, kind, bias):
    """And both are put back, wherever the layer is."""
    monkeypatch.setattr(module.layer_state, "export", lambda layer: {"mask": torch.ones(2)})
    taken: list[dict[str, torch.Tensor]] = []

    def take(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        return {"mask": state.pop(f"{prefix}mask")}

    monkeypatch.setattr(module.layer_state, "taken_from", take)
    monkeypatch.setattr(module.layer_state, "import_", lambda layer, own: taken.append(own))
    model = torch.nn.ModuleDict({"fc": _linear(kind, bias=bias)})
    state = model.state_dict()
    names = {"fc.weight", "fc.mask", *(("fc.bias",) if bias else ())}
    assert state.keys() == names and state["fc.mask"].tolist() == [1.0, 1.0]
    assert torch.equal(state["fc.weight"], model["fc"].weight)
    assert not state["fc.weight"].requires_grad
    other = torch.nn.ModuleDict({"fc": _linear(kind, bias=bias)})
    assert not torch.equal(other["fc"].weight, model["fc"].weight)
    found = other.load_state_dict(state)
    assert not found.missing_keys and not found.unexpected_keys
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [own["mask"].tolist() for own in taken] == [[1.0, 1.0]]
    assert model.state_dict(keep_vars=True)["fc.weight"] is model["fc"].weight
