"""A teacher's part of the model, a decoder's cache, and FP8 by `sparsify`, with stand-ins."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.errors import ConfigError
from megasparse.fp8 import DelayedScaling
from megasparse.megatron import inference, parallel_linear, teacher
from megasparse.megatron.parallel_linear import SparseColumnParallelLinear
from megasparse.megatron.sparsify import initial_low_rank_weights, sparsify
from megasparse.megatron.teacher import Teacher
from megasparse.sparsity.clock import Clock, draw_key
from megasparse.sparsity.recipe import make_recipe
from tests.megatron.test_sequence_parts import Group
from tests.runs import TINY


def _config(dtype: str | None = None) -> Any:
    config = resolve(load_config([*TINY, "--mock-data"]), 1)
    kept = dataclasses.replace(config.distillation, teacher_dtype=dtype)
    return dataclasses.replace(config, distillation=kept)


class Doubled(torch.nn.Module):
    """Stands for a part, or for a whole model."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3, 5), factor))

    def forward(self, value: Any, *more: Any) -> Any:
        if more:
            return value, *more
        if isinstance(value, tuple):
            return value[0] * self.weight[0, 0], value[1]
        return value * self.weight[0, 0]


@pytest.mark.parametrize(("dtype", "stored"), [(None, "float32"), ("bf16", "bfloat16")])
def test_a_teacher_is_only_read(monkeypatch, dtype, stored):
    built: list[Any] = []
    monkeypatch.setattr(teacher, "build_model", lambda *a: built.append(a) or Doubled())
    grid: Any = SimpleNamespace(pp_rank=0, pp_size=1)
    one = Teacher(_config(dtype), grid, 144)
    ((own, _, vocab),) = built
    assert own.train.bf16 is (dtype == "bf16") and vocab == 144
    assert not one.view.training and not any(p.requires_grad for p in one.view.parameters())
    assert one.stored == stored and one.bytes_here == 0
    for _ in range(2):
        one.freeze()
        assert one.bytes_here == 60
    assert one.logits("tokens", "positions", "mask") == ("tokens", "positions", "mask")  # type: ignore


@pytest.mark.parametrize(("rank", "parts"), [(0, [2.0, 3.0]), (1, [5.0, 7.0, 4.0])])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_stage_has_its_parts_and_hands_bytes_on(monkeypatch, rank, parts, with_mask):
    factors = (2.0, 3.0, 5.0, 7.0, 4.0)
    forward = lambda module, value: -module(value)  # noqa: E731
    specs = [SimpleNamespace(kind=Doubled, options={"factor": f}, forward=None) for f in factors]
    specs[-1].forward = None if with_mask else forward
    clocks: list[Any] = []
    monkeypatch.setattr(teacher, "stage_bounds", lambda _: [0, 2, 5])
    monkeypatch.setattr(
        teacher, "part_specs", lambda config, grid, vocab, clock: clocks.append(clock) or specs
    )
    monkeypatch.setattr(teacher, "finish_stage", lambda modules, *_: torch.nn.ModuleList(modules))
    grid: Any = SimpleNamespace(pp_rank=rank, pp_size=2)
    one = Teacher(_config("bf16"), grid, 144)
    assert [float(p[0, 0].detach()) for p in one.view.parameters()] == parts
    assert not any(module.training for module in one.view.modules())
    assert not any(p.requires_grad for p in one.view.parameters())
    assert len(clocks) == 1
    hidden = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    given: Any = hidden if rank == 0 else hidden.view(torch.uint8)
    mask = torch.ones(1)
    if rank:
        given = (given, mask) if with_mask else (given,)
    elif with_mask:
        given = (given, mask)
    factor = torch.tensor(parts).prod() * (-1 if rank and not with_mask else 1)
    assert torch.equal(one.run_stage(given).float(), hidden.float() * factor)


def test_a_teacher_in_fp8_says_so(monkeypatch):
    class Linear(Doubled):
        def freeze_in_fp8(self) -> int:
            self.weight = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
            return 19

    monkeypatch.setattr(teacher, "ParallelLinear", Linear)
    monkeypatch.setattr(
        teacher, "build_model", lambda *_: torch.nn.Sequential(Linear(), Linear(), Doubled())
    )
    grid: Any = SimpleNamespace(pp_rank=0, pp_size=1)
    one = Teacher(_config("fp8"), grid, 144)
    one.freeze()
    assert one.stored == "e4m3" and one.bytes_here == 19 + 19 + 60


def test_a_decoder_counts_its_tokens_and_refuses_more_than_fit(monkeypatch):
    asked: list[Any] = []

    class Model(torch.nn.Module):
        def forward(self, tokens: Any, positions: Any, mask: Any, **how: Any) -> torch.Tensor:
            asked.append((positions.tolist(), mask, how["runtime_gather_output"]))
            assert not self.training
            return torch.stack([tokens, positions], -1).float()

    model: Any = Model()
    decoder = inference.CachedDecoder(model, 5, batch_size=2)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert decoder.feed(tokens).tolist() == [[7, 2], [10, 2]] and decoder.length == 3
    with pytest.raises(ConfigError, match="2 tokens after the context, expected one at a time"):
        decoder.feed(tokens[:, :2])
    with pytest.raises(ConfigError, match="6 tokens, expected at most 5"):
        decoder.feed(tokens)
    for number in (3, 4):
        assert decoder.feed(tokens[:, :1]).tolist() == [[5, number], [8, number]]
    with pytest.raises(ConfigError, match="6 tokens, expected at most 5"):
        decoder.feed(tokens[:, :1])
    assert asked[0] == ([[0, 1, 2]] * 2, None, True) and decoder.length == 5


def _model(monkeypatch, inputs: int = 128, outputs: int = 128, parts: int = 1) -> Any:
    """Two linears, of which `fc1` is to be sparse."""
    monkeypatch.setattr(
        parallel_linear, "get_tensor_model_parallel_group_if_none", lambda *_, **__: Group(0, 1)
    )
    config = SimpleNamespace(
        sequence_parallel=False, use_cpu_initialization=True, params_dtype=torch.float32
    )
    model = torch.nn.ModuleDict(
        {
            name: SparseColumnParallelLinear(inputs, outputs, config=config, stride=parts)
            for name in ("fc1", "proj")
        }
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


RECIPE = make_recipe("fst", sparse_layers=("fc1",))


def test_all_linears_are_in_fp8_where_it_is_asked_for(monkeypatch):
    model = _model(monkeypatch)
    scaling = DelayedScaling(torch.device("cpu"))
    controller = sparsify(model, RECIPE, Clock(1, 10), fp8=scaling, fp8_hybrid=True)
    sparse, dense = model["fc1"], model["proj"]
    assert sparse.state.quantizers is not None and sparse.state.fp8_hybrid and sparse.dense is None
    assert dense.dense is not None and dense.state is None
    assert [state.name for state, _ in controller.weights] == ["fc1.weight"]
    assert controller.layers == [draw_key("fc1")] and len(controller.dense) == 1
    assert controller.monitor and controller.fp8 is scaling and scaling.scale.numel() > 0


def test_nothing_is_in_fp8_or_added_unless_it_is_asked_for(monkeypatch):
    model = _model(monkeypatch)
    controller = sparsify(model, RECIPE, Clock(1, 10))
    sparse, dense = model["fc1"], model["proj"]
    assert sparse.state.quantizers is None and not sparse.state.fp8_hybrid
    assert dense.dense is dense.state is dense.controller is None and not controller.dense
    assert sparse.slorb_adapter is None and initial_low_rank_weights(model) == []
    assert controller.monitor and controller.fp8 is None


@pytest.mark.parametrize("trained", [True, False])
def test_a_low_rank_branch_is_of_sparse_linears_alone(monkeypatch, trained):
    model = _model(monkeypatch)
    recipe = make_recipe("ste", sparse_layers=("fc1",))
    more = {} if trained else {"slorb_train_projection": False}
    sparsify(model, recipe, Clock(1, 10), slorb_k=16, **more)  # type: ignore[arg-type]
    assert model["fc1"].slorb_adapter.shape == (128, 8) and model["proj"].slorb_adapter is None
    assert (model["fc1"].slorb_projection is not None) == trained
    assert len(initial_low_rank_weights(model)) == 1 + trained


@pytest.mark.parametrize(
    ("inputs", "outputs", "refused"),
    [(128, 64, "fc1"), (64, 128, "fc1"), (120, 128, "fc1"), (128, 128, None)],
)
def test_shapes_that_the_gemms_do_not_take_are_refused(monkeypatch, inputs, outputs, refused):
    scaling = DelayedScaling(torch.device("cpu"))
    model = _model(monkeypatch, inputs, outputs)
    if refused is None:
        sparsify(model, RECIPE, Clock(1, 10), fp8=scaling)
        return
    with pytest.raises(ConfigError, match=f"{refused}: FP8 of a 2:4 linear .*multiples of 128"):
        sparsify(model, RECIPE, Clock(1, 10), fp8=scaling)


@pytest.mark.parametrize(("inputs", "refused"), [(64, False), (72, True)])
def test_dense_linears_have_shapes_of_their_own(monkeypatch, inputs, refused):
    model = _model(monkeypatch, inputs, 64)
    scaling = DelayedScaling(torch.device("cpu"))
    if not refused:
        sparsify(model, make_recipe("dense"), Clock(1, 10), fp8=scaling)
        assert model["fc1"].dense is not None
        return
    with pytest.raises(ConfigError, match="fc1: FP8 of a dense linear .*multiples of 16"):
        sparsify(model, make_recipe("dense"), Clock(1, 10), fp8=scaling)
