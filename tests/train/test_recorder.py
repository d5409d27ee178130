"""What is recorded: the same figures in every layout, whole files, and what each figure means."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch

from megasparse.estimate.flops import TokenFlops
from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import mvue24, mvue24_variance, transposable24_mask
from megasparse.metrics.schema import LOG_METRICS, METRICS, STEP_METRICS, read_metrics
from megasparse.optim.fragments import Fragment
from megasparse.optim.masked_decay import MaskedDecay
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.dense_weight import DenseFp8Weight
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.probe import NOTHING
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from megasparse.sparsity.stats import layer_figures, measure
from megasparse.timer import PHASES
from megasparse.train.layer_metrics import summary
from megasparse.train.recorder import Recorder
from megasparse.train.stragglers import StragglerWatch
from tests import dist
from tests.runs import LLAMA, TINY, train

RUN = [
    *LLAMA, "--train-iters", "5", "--log-interval", "3", "--log-layers", "--log-csv",
    "--mask-update-interval", "2", "--simulate-fp8", "--eval-iters", "1", "--save-interval", "none",
]  # fmt: skip
LAYOUTS = {
    "one": ([], 1),
    "tp2-sp": (["--tensor-model-parallel-size", "2", "--sequence-parallel"], 2),
    "dp2-zero1": (["--zero-stage", "1"], 2),
    "pp2": (["--pipeline-model-parallel-size", "2"], 2),
}
MASKED = "--masked-decay", "0.05"


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    root, results = tmp_path_factory.mktemp("metrics"), {}
    for name, (flags, world) in LAYOUTS.items():
        arguments = [*TINY, *RUN, *MASKED, "--data-path", dataset, "--run-dir", str(root / name)]
        more = [*flags, "--peak-tflops", "1.0"] if name == "one" else flags
        rows = dist.run(train, world, [*arguments, *more])[0]
        results[name] = (rows, read_metrics(root / name / "layers.jsonl"), root / name)
    return results


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_layers_have_the_same_figures_in_every_layout(runs, name):
    _, expected, _ = runs["one"]
    _, found, _ = runs[name]
    assert [(r["step"], r["layer"]) for r in found] == [(r["step"], r["layer"]) for r in expected]
    assert len({row["layer"] for row in found}) == 4
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for figure in a.keys() - {"step", "layer"}:
            # A value at the edge of FP8's rounding may fall to the other side.
            close = {"rel": 0.05, "abs": 2e-4} if "fp8" in figure else {"rel": 1e-3}
            # A rank's gradients are those of its own micro-batches' mean: half as many here.
            own = 2 if name == "dp2-zero1" and "amax_grad" in figure else 1
            assert a[figure] == pytest.approx(own * b[figure], **close), (b["layer"], figure)
    figures = {key for row in found if row["step"] == 5 for key in row}
    assert figures >= {
        "density",
        "flip_rate",
        "retained_l1",
        "decay_ratio",
        "mvue_amplification",
        "mvue_variance",
        "fp8_amax_x",
        "fp8_saturated_weight",
        "fp8_lost_grad_output",
        "fp8_amax_grad_output_mvue",
    }


def test_rows_have_what_is_documented_at_log_steps(runs):
    rows, _, folder = runs["one"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    log_only = {metric.key for metric in LOG_METRICS}
    for row in rows:
        if row["step"] not in (1, 3, 5):
            assert not log_only & row.keys()
    third = rows[2]
    of_others = {"scale", "double_pruned", "load_balancing_loss", "z_loss"}
    assert log_only - of_others <= third.keys()
    assert third.keys() <= {metric.key for metric in METRICS}
    assert {metric.key for metric in STEP_METRICS} == rows[4].keys() & {
        metric.key for metric in STEP_METRICS
    }
    # The mean rate of the steps since the log step before, which are of one size.
    rates = [row["tokens_per_second"] for row in rows[1:3]]
    mean = len(rates) / sum(1 / rate for rate in rates)
    assert third["tokens_per_second_per_gpu"] == pytest.approx(mean)
    assert third["mfu"] == pytest.approx(third["tflops"])  # the peak is 1 TFLOP/s
    assert third["tflops_true"] == pytest.approx(third["tflops"])  # nothing is saved on a CPU
    times = {phase: third[f"time_{phase}"] for phase in PHASES}
    for phase in ("data", "forward", "backward", "optimizer", "preparation"):
        assert times[phase] > 0, phase
    assert third["mvue_amplification"] > 1 and 0.5 < third["retained_l1"] < 1
    with open(folder / "metrics.csv") as stream:
        table = list(csv.DictReader(stream))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in rows]
    assert [row["mfu"] != "" for row in table] == [True, False, True, False, True]


def test_communication_has_its_time_and_the_peak_is_not_guessed(runs):
    for name in ("tp2-sp", "dp2-zero1", "pp2"):
        rows, _, _ = runs[name]
        assert rows[2]["time_communication"] > 0, name
        assert "mfu" not in rows[2]


def _sparse(recipe, weight):
    controller = SparsityController(recipe, Clock(seed=1, train_iters=100))
    state = SparseWeight("w", recipe, WeightShard(tuple(weight.shape)))
    controller.register(state, weight, 0)
    controller.ask(True)
    return controller, state


def _figures(controller):
    found = measure(
        controller.weights, controller.sparse_now, torch.device("cpu"), controller.dense
    )
    totals = (found.weight_sums, found.step_sums, found.maxima)
    return layer_figures(found, *(total.tolist() for total in totals))["w"]


def test_figures_are_what_they_say():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(16, 32))
    controller, state = _sparse(make_recipe("fst", masked_decay=0.25), weight)
    gemms = state.gemms(weight, 0, True, True)
    dz, x = torch.randn(24, 16), torch.randn(24, 32)
    gemms.grad_weight(gemms.prepare_grad_output(dz, 7), (x,))
    gemms.grad_weight(gemms.prepare_grad_output(2 * dz, 8), (x,))
    weight.grad = torch.randn(16, 32)
    decay = MaskedDecay(controller)
    decay.attach([Fragment("w", weight, weight, 0, 0, weight.numel())])
    decay.measure(torch.optim.SGD([weight]), controller.masked_decay())
    found = _figures(controller)

    mask = transposable24_mask(weight.detach())
    kept, lost = weight.detach() * mask, weight.detach() * ~mask
    drawn = [mvue24(dz, seed=7, dim=0), mvue24(2 * dz, seed=8, dim=0)]
    assert found == {
        "density": 0.5,
        "retained_l1": pytest.approx(float(kept.abs().sum() / weight.abs().sum()), rel=1e-6),
        "decay_ratio": pytest.approx(float(0.25 * lost.norm() / weight.grad.norm()), rel=1e-6),
        "mvue_amplification": pytest.approx(
            float(sum(d.square().sum() for d in drawn) / (5 * dz.square().sum())), rel=1e-6
        ),
        # That of 2 dZ is four times that of dZ.
        "mvue_variance": pytest.approx(
            float(mvue24_variance(dz, dim=0) / dz.square().sum()), rel=1e-5
        ),
    }


def test_fp8_figures_of_a_known_tensor():
    weight = torch.nn.Parameter(torch.eye(8))
    controller, state = _sparse(make_recipe("ste", simulate_fp8=True), weight)
    x = torch.zeros(4, 8)
    x[0] = torch.tensor([2.0, -2.0, 1.0, 1e-9, 0.0, 0.0, 0.0, 0.0])
    state.gemms(weight, 0, True, True).output(x)
    found = _figures(controller)
    assert found["fp8_amax_x"] == 2.0
    assert found["fp8_saturated_x"] == 2 / 32  # both entries of magnitude 2
    assert found["fp8_lost_x"] == 1 / 32  # 1e-9 becomes 0
    row = summary({"a": found, "b": {"density": 1.0, "fp8_amax_x": 3.0}}, {})
    assert row["fp8_amax"] == 3.0 and row["density"] == (1.0 + found["density"]) / 2


def _fp8_weights(recipe):
    """A controller with a sparse and a dense weight of 128 x 128 in FP8, and both weights."""
    scales = DelayedScaling(torch.device("cpu"))
    controller = SparsityController(make_recipe(recipe), Clock(seed=1, train_iters=10), fp8=scales)
    sparse, dense = (torch.nn.Parameter(torch.randn(128, 128).bfloat16()) for _ in "ab")
    state = SparseWeight("sparse", controller.recipe, WeightShard((128, 128)))
    state.quantizers = OperandQuantizers.of(scales)
    other = DenseFp8Weight("dense", OperandQuantizers.of(scales))
    scales.allocate()
    controller.register(state, sparse, 0)
    controller.dense.append((other, dense))
    return controller, state, other, sparse.detach(), dense.detach()


@pytest.mark.parametrize("recipe", ["fst", "ste"])
@pytest.mark.parametrize("sparse_now", [True, False])
def test_every_layer_in_fp8_tells_how_it_was_rounded(recipe, sparse_now):
    """Dense ones too, and sparse ones in a dense phase: the same figures, by the same rules."""
    controller, state, other, sparse, dense = _fp8_weights(recipe)
    dz, eight = torch.randn(128, 128).bfloat16(), torch.full((128, 128), 8.0).bfloat16()
    eight[0, 0] = 1e-7
    for asked in (False, True):
        controller.ask(asked)
        assert controller.asked == asked
        state.invalidate(), other.invalidate()
        ours = state.gemms(sparse, 0, sparse_now, True)
        theirs = other.gemms(eight, 0)
        for gemms in (ours, theirs):
            gemms.prepare_grad_output(dz, 3)
        if not asked:
            assert not state.probe.sums and not other.probe.sums
    found = measure(controller.weights, sparse_now, torch.device("cpu"), controller.dense)
    totals = (found.weight_sums, found.step_sums, found.maxima)
    figures = layer_figures(found, *(total.tolist() for total in totals))
    assert list(figures) == ["sparse", "dense"]
    fp8 = {f"fp8_{k}_{o}" for k in ("amax", "lost", "saturated") for o in ("weight", "grad_output")}
    assert set(figures["dense"]) == fp8 <= set(figures["sparse"])
    assert figures["dense"]["fp8_amax_weight"] == 8.0
    assert figures["dense"]["fp8_lost_weight"] == 1 / 128**2
    assert figures["dense"]["fp8_amax_grad_output"] == float(dz.abs().amax())
    kept = state.effective(sparse) if sparse_now else sparse
    assert figures["sparse"]["fp8_amax_weight"] == float(kept.abs().amax())
    # A figure of the run is the worst of both; what is a mean is of sparse layers alone.
    whole = summary(figures, {"sparse": 128**2})
    assert whole["fp8_amax"] == 8.0 and whole["density"] == (0.5 if sparse_now else 1.0)
    controller.restore(controller.snapshot())  # a skipped step
    assert not any(float(v) for v in other.probe.sums.values())
    assert all(float(v) == NOTHING for v in other.probe.maxima.values())


def test_the_flip_rate_of_a_run_is_all_flips_over_all_entries():
    layers = {"a": {"flip_rate": 1 / 16}, "b": {"flip_rate": 3 / 48}, "c": {"density": 1.0}}
    assert summary(layers, {"a": 16, "b": 48, "c": 99})["flip_rate"] == 4 / 64
    layers["a"]["flip_rate"] = 0.5
    assert summary(layers, {"a": 16, "b": 48, "c": 99})["flip_rate"] == 11 / 64


PHASES_OF_A_RUN = [
    "--train-iters", "8", "--dense-warmup-fraction", "0.375", "--dense-tail-fraction", "0.25",
    "--log-interval", "5", "--sparsity-recipe", "s_ste", "--masked-decay", "none", "--bf16",
]  # fmt: skip


def test_density_is_that_of_the_phase_and_a_resume_tells_the_same(dataset, tmp_path):
    def run(name, *more):
        flags = [*TINY, *PHASES_OF_A_RUN, "--data-path", dataset, "--run-dir", str(tmp_path / name)]
        return dist.run(train, 1, [*flags, *more])[0]

    rows = run("whole")
    assert [row["sparse"] for row in rows] == [row["density"] < 0.9 for row in rows]
    for step in (3, 4, 6):
        run(f"cut-{step}", "--exit-interval", str(step))
        again = run(f"cut-{step}", "--resume")
        for figure in ("density", "flip_rate"):
            assert [r.get(figure) for r in again] == [r.get(figure) for r in rows], (step, figure)


@pytest.mark.parametrize("sparse_now", [True, False])
def test_a_step_after_an_evaluation_has_the_figures_of_its_weights(sparse_now):
    """The evaluation has made the operands, and nobody had asked by then."""
    controller, state, other, sparse, dense = _fp8_weights("fst")
    for _ in range(2):
        state.gemms(sparse, 0, sparse_now, True)
        other.gemms(dense, 0)
    controller.ask(True)
    for _ in range(2):  # micro-batches
        state.gemms(sparse, 0, sparse_now, True)
        other.gemms(dense, 0)
    for one in (state, other):
        assert float(one.probe.sums["fp8_weight_all"]) == 128**2
    assert controller.preparations(0) == 1
    controller.ask(False)
    state.gemms(sparse, 0, sparse_now, True)
    assert float(state.probe.sums["fp8_weight_all"]) == 128**2


def test_probes_that_are_not_asked_measure_nothing():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    controller, state = _sparse(make_recipe("fst", simulate_fp8=True), weight)
    controller.ask(False)
    gemms = state.gemms(weight, 0, True, True)
    gradient = gemms.prepare_grad_output(torch.randn(8, 8), 1)
    gemms.grad_weight(gradient, (gemms.output(torch.randn(8, 8)),))
    assert not state.probe.sums and not state.probe.maxima and not controller.asked


def test_rows_are_json_on_one_line_each(runs):
    _, _, folder = runs["pp2"]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)


@pytest.mark.parametrize(("world", "dp"), [(1, 1), (8, 2)])
def test_rates_are_of_one_rank_and_utilization_of_the_dense_model(monkeypatch, world, dp):
    """Tensor-parallel ranks save each its part of a token; data-parallel ones the same."""
    recorder = Recorder.__new__(Recorder)
    recorder._timer = SimpleNamespace(seconds=lambda split: {"forward": 1.0, "backward": 2.0})
    recorder._controller = SimpleNamespace(halved_flops_per_token=lambda again: 30.0 * again)
    recorder._grid = SimpleNamespace(
        device=torch.device("cpu"), world=world, dp_size=dp, dp_cp_size=dp, pp_size=1, rank=0
    )
    recorder._engine, recorder._sparse, recorder._split = None, True, []
    recorder._again, recorder._peak = 2.0, 5e-10
    recorder._flops = TokenFlops(dense=1000.0, recomputed=100.0, saved=-1.0)
    recorder._tokens, recorder._seconds = 4096 * world, 8.0
    recorder._config = SimpleNamespace(
        logging=SimpleNamespace(log_interval=1),
        train=SimpleNamespace(train_iters=9),
        model=SimpleNamespace(expert_layers=[False]),
    )
    recorder._stragglers, recorder.only_log = StragglerWatch(), None

    def all_ranks(engine, sparse, more, largest):
        own = len(more) - world
        return {}, [value * world for value in more[:own]] + more[own:], 7.0

    monkeypatch.setattr("megasparse.train.layer_metrics.measure_all", all_ranks)
    _, row = recorder._measured(3)
    assert row["tokens_per_second_per_gpu"] == 512.0 and row["memory_gib"] == 7.0
    assert row["tflops"] == pytest.approx(512 * 1000 / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops"] / 5e-10)
    saved = 60.0 * world / dp
    assert row["tflops_true"] == pytest.approx(512 * (1100 - saved) / 1e12)
    assert row["time_forward"] == 1.0 and row["time_backward"] == 2.0
    assert (recorder._tokens, recorder._seconds) == (0, 0.0)
