"""When graphs are let go, looked at and refused: the rules, without a run around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.megatron.graphs import layer_graphs as module
from megasparse.megatron.graphs.layer_graphs import LayerGraphs, refusal
from megasparse.megatron.graphs.recorder import Replayed
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.recipe import make_recipe
from tests.runs import TINY


class Recorder:
    """Records nothing; a run of what was recorded is a call."""

    made = 0
    fails = False

    def __init__(self, device: Any = None) -> None:
        Recorder.made += 1
        self.pools = 0

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def prepared(self) -> Any:
        return module.contextlib.nullcontext()

    def record(self, body: Any, pool: Any) -> Any:
        if self.fails:
            raise RuntimeError("out of memory\nand more")
        return (), body


class Scaling:
    """Stands for FP8 scales, which assume less and less of the operands."""

    share, host_follows, assumed = 1.0, False, 0

    def share_assumed(self) -> float:
        return self.share

    def assume(self) -> None:
        self.assumed += 1

    def finish_step(self) -> None: ...


def _graphs(slots: int = 1, fp8: Any = None, layers: int = 2) -> tuple[LayerGraphs, Any]:
    controller = SparsityController(make_recipe("dense"), Clock(1, 10**6), fp8=fp8)
    grid: Any = SimpleNamespace(device=torch.device("cpu"), max_over_stage=lambda t: t)
    graphs = LayerGraphs([], controller, grid, None, slots, make_recorder=Recorder)  # type: ignore
    graphs._layers = [SimpleNamespace(pair=None) for _ in range(layers)]  # type: ignore[misc]
    return graphs, controller


def _with_sets(graphs: LayerGraphs, slots: int = 1) -> list[Any]:
    sets = [SimpleNamespace(pairs=[f"{slot}{n}" for n in "ab"]) for slot in range(slots)]
    graphs._sets = {False: sets}  # type: ignore[dict-item]
    graphs._active = sets  # type: ignore[assignment]
    return sets


def test_a_micro_batch_uses_the_graphs_of_its_slot():
    graphs, controller = _graphs(slots=2)
    assert [graphs.slot_of(n) for n in range(5)] == [0, 1, 0, 1, 0]
    _with_sets(graphs, 2)
    controller.seeds.begin_step([0, 1, 2])
    for number in range(3):
        graphs.begin_micro_batch(number)
        slot = number % 2
        assert controller.clock.slot == slot
        assert [layer.pair for layer in graphs._layers] == [f"{slot}a", f"{slot}b"]
    graphs._active = None
    graphs.begin_micro_batch(1)
    assert [layer.pair for layer in graphs._layers] == [None, None]


def test_after_a_step_layers_run_eagerly_and_its_kind_is_known():
    graphs, controller = _graphs()
    _with_sets(graphs)
    controller.seeds.begin_step([0])
    graphs.begin_micro_batch(0)
    assert not graphs._warm
    graphs.end_step()
    assert graphs._warm == {controller.asked} and graphs._active is None
    assert [layer.pair for layer in graphs._layers] == [None, None]
    assert graphs._sets  # and are there for the next


def test_scales_are_looked_at_more_and_more_rarely():
    scaling: Any = Scaling()
    graphs, controller = _graphs(fp8=scaling)
    _with_sets(graphs)
    asked: list[int] = []
    scaling.share_assumed = lambda: asked.append(controller.clock.step) or 1.0
    for step in range(70):
        controller.clock.step = step
        graphs.end_step()
    assert asked == [0, 8, 24, 56]  # patience of 4 steps, doubled each time
    assert graphs._sets


@pytest.mark.parametrize(("share", "kept"), [(1.0, True), (0.8125, True), (0.75, False)])
def test_graphs_are_let_go_where_scales_have_moved(share, kept):
    scaling: Any = Scaling()
    scaling.share = share
    graphs, _ = _graphs(fp8=scaling)
    graphs.end_step()
    assert scaling.assumed == 0  # without graphs nobody asks
    _with_sets(graphs)
    made = Recorder.made
    graphs.end_step()
    assert bool(graphs._sets) == kept
    if not kept:
        assert scaling.host_follows and scaling.assumed == 1 and Recorder.made == made + 1


def test_what_is_let_go_is_gone_and_what_is_not_there_costs_nothing():
    graphs, controller = _graphs(fp8=Scaling())
    made = Recorder.made
    graphs.let_go()
    assert Recorder.made == made and controller.fp8.assumed == 0
    _with_sets(graphs)
    graphs._layers[0].pair = "pair"
    graphs.let_go()
    assert not graphs._sets and graphs._active is None and graphs._layers[0].pair is None
    assert Recorder.made == made + 1


def test_after_the_end_nothing_is_captured():
    graphs, controller = _graphs()
    graphs.begin_step([0])
    graphs.end_step()
    _with_sets(graphs)
    updates: list[int] = []
    graphs.update(lambda: updates.append(1))
    kept = graphs._update
    graphs.update(lambda: updates.append(2))  # always the same function
    assert updates == [1, 1] and graphs._update is kept
    graphs.close()
    assert not graphs._sets and graphs._update is None
    graphs._capture = lambda kind: pytest.fail("captured")  # type: ignore[method-assign]
    graphs.begin_step([0])
    assert graphs._active is None


def test_a_new_phase_or_states_that_moved_begin_anew():
    graphs, controller = _graphs()
    for change in ("moves", None):
        graphs.begin_step([0])
        graphs.end_step()
        _with_sets(graphs)
        graphs.update(lambda: None)
        before = graphs._refill, graphs._refresh, graphs._update
        if change:
            graphs._phase = (controller.span.number, controller.moves + 1)
        graphs.begin_step([0])
        after = graphs._refill, graphs._refresh, graphs._update
        if change:
            assert not graphs._sets and not graphs._warm and graphs._update is None
            assert before[0] is not after[0] and before[1] is not after[1]
        else:
            assert graphs._sets and before == after


@pytest.mark.parametrize("known", [False, True])
def test_the_second_step_of_a_kind_is_captured(known):
    graphs, controller = _graphs()
    captured: list[bool] = []
    graphs._capture = captured.append  # type: ignore[method-assign, assignment]
    graphs.begin_step([0])
    assert captured == []
    graphs.end_step()
    if known:
        _with_sets(graphs)
    graphs.begin_step([0])
    assert captured == ([] if known else [False])
    graphs._refusal = "no"
    graphs._sets = {}
    graphs.begin_step([0])
    graphs._refusal, graphs.paused = None, True
    graphs.begin_step([0])
    assert len(captured) == (not known)


@pytest.mark.parametrize("failure", [None, RuntimeError("no memory\nand more"), KeyError("odd")])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_spans_are_not_timed_while_layers_are_captured(failure, timed, kept):
    """And the timer, the slot and the scales are as they were, or as replays need them."""
    scaling: Any = Scaling()
    scaling.host_follows = True
    graphs, controller = _graphs(fp8=scaling)
    for layer in graphs._layers:
        layer.refusal, layer.whole = (lambda: None), True
    if kept:
        _with_sets(graphs)
    controller.timer.measuring = timed
    seen: list[tuple[bool, bool]] = []

    def captured() -> Any:
        seen.append((controller.timer.measuring, scaling.host_follows))
        controller.clock.slot = 5
        if failure is not None:
            raise failure
        return ["sets"], 0

    graphs._captured = captured  # type: ignore[method-assign]
    controller.clock.step = 7
    if isinstance(failure, KeyError):  # no failure of a capture
        with pytest.raises(KeyError):
            graphs._capture(True)
    else:
        graphs._capture(True)
    assert seen == [(False, False)]
    assert controller.timer.measuring == timed and controller.clock.slot == 0
    if failure is None:
        assert graphs._sets[True] == ["sets"] and graphs._refusal is None
        assert graphs._look_at == 7 + module.FIRST_PATIENCE and not scaling.host_follows
        assert scaling.assumed == (not kept)  # by the first capture alone
    elif isinstance(failure, RuntimeError):
        assert not graphs._sets and graphs._refusal == "no memory" and scaling.host_follows


def test_a_layer_that_cannot_be_captured_leaves_all_eager():
    graphs, _ = _graphs()
    for layer, reason in zip(graphs._layers, (None, "odd"), strict=True):
        layer.refusal = lambda reason=reason: reason
    graphs._captured = lambda: pytest.fail("captured")  # type: ignore[method-assign]
    graphs._capture(False)
    assert graphs._refusal == "odd" and not graphs._sets


@pytest.mark.parametrize("slots", [1, 3])
def test_every_slot_has_a_set_and_its_bar_is_gone_at_the_end(monkeypatch, slots):
    graphs, controller = _graphs(slots)
    made: list[int] = []
    bars: list[dict[str, Any]] = []

    class Bar:
        passes = 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def update(self, by: int) -> None:
            self.passes += by

    bar = Bar()
    monkeypatch.setattr(module, "progress", lambda **how: bars.append(how) or bar)

    def make(layers: Any, places: Any, recorder: Any, around: Any, done: Any) -> str:
        made.append(controller.clock.slot)
        assert layers is graphs._layers and recorder is graphs._recorder
        for _ in range(2 * len(layers)):
            done()
        return f"set {controller.clock.slot}"

    monkeypatch.setattr(module, "GraphSet", make)
    sets, before = graphs._captured()
    assert sets == [f"set {n}" for n in range(slots)] and made == list(range(slots)) and before == 0
    assert bars[0]["leave"] is False and bars[0]["total"] == bar.passes == 4 * slots


@pytest.mark.parametrize("failure", [None, "no memory"])
@pytest.mark.parametrize("other", [False, True])
def test_a_failure_of_any_rank_is_that_of_all(failure, other):
    graphs, _ = _graphs()
    _with_sets(graphs)
    graphs._grid.max_over_stage = lambda flag: flag.clamp(min=float(other))  # type: ignore
    assert graphs._failed(failure) == (failure is not None or other)
    if failure is None and not other:
        assert graphs._sets and graphs._refusal is None
    else:
        assert not graphs._sets
        assert graphs._refusal == (failure or "another rank could not capture its layers")


def test_a_run_is_captured_where_it_can_be():
    config = resolve(load_config([*TINY, "--mock-data"]), 1)
    gpu = torch.device("cuda")
    expected = module.graphs_refusal(config)
    assert refusal(gpu, config, poisoned=False) == expected
    assert refusal(gpu, config, poisoned=True) == "gradients are to be poisoned"
    assert refusal(torch.device("cpu"), config, poisoned=True) == "the run is on cpu"


@pytest.mark.parametrize("fails", [False, True])
def test_a_function_is_recorded_at_its_second_call_or_never(fails):
    calls: list[int] = []
    recorder: Any = Recorder()
    recorder.fails = fails
    replayed = Replayed(lambda: calls.append(1))
    for number in range(1, 5):
        replayed(recorder)
        assert len(calls) == number and recorder.pools == min(number - 1, 1)
