"""The life of CUDA graphs over runs, on CPUs: replays are emulated, all around them is real.

An emulated graph runs its function again at every replay and puts the results where the first ones
were. Losses, metrics and weights must be those of an eager run, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megasparse.megatron.graphs.recorder import Replayed
from tests import dist
from tests.runs import LLAMA, TINY, train


class Emulated:
    """A recorder whose replays run the function again."""

    replays = 0  # of layers' passes
    controller: Any = None  # of the run
    fails = 0  # the number of the recording that fails

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recordings = 0

    def new_pool(self) -> None:
        return None

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        yield

    def leaving_generator(self, replay):
        return replay

    def record(self, body, pool):
        of_a_layer = not isinstance(body.__self__, Replayed)
        self.recordings += of_a_layer
        if of_a_layer and self.recordings == self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
        # What is recorded does not run; a layer has to, for the shapes of its results.
        with self._leaving_no_trace():
            first = body() if of_a_layer else ()
        places = tuple(None if t is None else t.detach().clone() for t in first)
        clock = self.controller.clock
        slot = clock.slot  # a graph reads the seeds of the slot that it was captured for

        def replay() -> None:
            Emulated.replays += of_a_layer
            with clock.at(clock.micro_batch, slot):
                values = body()
            for place, value in zip(places, values, strict=True):
                if place is not None:
                    place.copy_(value.detach())

        return places, replay

    @contextlib.contextmanager
    def _leaving_no_trace(self) -> Iterator[None]:
        """What probes have measured is of micro-batches, and a recording is of none."""
        probes = list(self.controller._probes())
        kept = [t for probe in probes for t in (*probe.sums.values(), *probe.maxima.values())]
        before = [tensor.clone() for tensor in kept]
        yield
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        after = [len(probe.sums) + len(probe.maxima) for probe in probes]
        assert sum(after) == len(kept), "a capture would have made what is measured"


# TINY without its decay, which some recipes refuse. Six micro-batches a step, a refresh every 2
# steps, metrics every 4, all phases.
_DECAY = TINY.index("--masked-decay")
_WITHOUT_DECAY = [*TINY[:_DECAY], *TINY[_DECAY + 2 :]]
# On a GPU sequences as short as these are captured with this attention alone.
RUN = [
    *_WITHOUT_DECAY, "--global-batch-size", "12", "--train-iters", "14",
    "--mask-update-interval", "2", "--log-interval", "4", "--eval-iters", "1",
    "--eval-interval", "5", "--dense-warmup-fraction", "0.25", "--dense-tail-fraction", "0.25",
    "--transformer-impl", "local",
]  # fmt: skip
RECOMPUTE = [
    "--recompute-granularity",
    "full",
    "--recompute-method",
    "uniform",
    "--recompute-num-layers",
    "1",
]
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
S_STE = ["--sparsity-recipe", "s_ste"]
RUNS: dict[str, tuple[int, list[str]]] = {
    "fst": (1, LLAMA),
    # The linears of the attention are dense, those of the MLP 2:4 between two dense phases.
    "fst and dense, fp8": (
        1,
        [
            *LLAMA,
            "--bf16",
            "--fp8-format",
            "hybrid",
            "--hidden-size",
            "128",
            "--ffn-hidden-size",
            "128",
            "--sparse-layers",
            "*.mlp.*",
            "--log-interval",
            "3",  # twice in the sparse phase, so that a step with metrics is replayed
        ],
    ),
    "fst, recomputed": (1, [*LLAMA, *RECOMPUTE]),
    # QK norms, norms before and behind, a window, every second layer without rotary positions.
    "fst, of newer models": (
        1,
        [
            *[*LLAMA, "--qk-layernorm", "--qk-layernorm-scope", "all", "--norm-placement", "both"],
            *["--window-size", "3,0", "--no-rope-freq", "2"],
        ],
    ),
    # Two, six and six steps: each phase is captured anew.
    "dense, fst, row-wise": (
        1,
        [
            *("--dense-warmup-fraction", "none", "--dense-tail-fraction", "none"),
            *("--sparsity-phases", "dense:1/7,fst:3/7,row+grad-input=double-pruned:3/7"),
        ],
    ),
    # A dense layer, and two whose attention alone is captured.
    "fst, experts": (
        1,
        [
            *[*LLAMA, "--num-experts", "4", "--moe-layer-freq", "[0,1,1]", "--moe-ffn-hidden-size"],
            *["32", "--moe-aux-loss-coeff", "0.01", "--num-layers", "3"],
            *["--sparse-layers", "*.mlp.*", "*.self_attention.linear_*"],
        ],
    ),
    "s_ste, scale of every step": (1, [*S_STE, "--s-ste-scale", "every_step"]),
    "fst, ZeRO 1, ramp-up": (
        1,
        [
            *LLAMA,
            "--zero-stage",
            "1",
            "--rampup-batch-size",
            "4",
            "4",
            "30",
        ],
    ),
    "fst, dp 2, ZeRO 2": (2, ["--zero-stage", "2", "--global-batch-size", "24"]),
    "s_ste, tp 2, sp": (2, [*LLAMA, *S_STE, *TP2, "--sequence-parallel"]),
    "fst, pp 2, ramp-up": (2, [*LLAMA, *PP2, "--rampup-batch-size", "4", "4", "30"]),
    "fst, pp 2, recomputed": (2, [*LLAMA, *PP2, *RECOMPUTE]),
}


def _train(rank: int, world: int, flags: list[str], emulated: bool) -> tuple[Any, dict, int]:
    """Rows of metrics, the weights, and how often anything was replayed."""
    from megasparse.megatron.graphs import layer_graphs
    from megasparse.train import loop
    from megasparse.train.engine import layout

    kept: list[Any] = []
    made = loop.build_engine

    def keep(*args: Any, **options: Any) -> Any:
        kept.append(made(*args, **options))
        Emulated.controller = kept[0].controller
        return kept[0]

    bars: list[Any] = []
    bar = layer_graphs.progress
    shown = lambda **how: bars.append(bar(**how, stream=io.StringIO())) or bars[-1]  # noqa: E731
    graphs = functools.partial(layer_graphs.LayerGraphs, make_recorder=Emulated)
    reasons = layer_graphs.refusal
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "build_engine", keep))
        if emulated:
            stack.enter_context(mock.patch.object(layout, "LayerGraphs", graphs))
            as_on_gpu = lambda device, *rest: reasons(torch.device("cuda"), *rest)  # noqa: E731
            stack.enter_context(mock.patch.object(layer_graphs, "refusal", as_on_gpu))
            stack.enter_context(mock.patch.object(layer_graphs, "progress", shown))
            stack.enter_context(mock.patch.object(layer_graphs, "is_logging_rank", lambda: True))
        rows = train(rank, world, flags)
    assert emulated == bool(bars)
    assert Emulated.fails or all(bar.n == bar.total > 0 for bar in bars)
    weights = {name: p.detach().clone() for name, p in kept[0].model.named_parameters()}
    timed = ("tokens_per_second", "tflops", "mfu", "memory_gib", "time_")
    rows = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
    return rows, weights, Emulated.replays


@pytest.mark.parametrize(("world", "more"), RUNS.values(), ids=RUNS)
def test_a_replayed_run_is_the_eager_one(tmp_path: Path, dataset: str, world, more):
    results = []
    for emulated in (False, True):
        flags = [*RUN, *more, "--data-path", dataset, "--run-dir", str(tmp_path / str(emulated))]
        results.append(dist.run(_train, world, flags, emulated))
    for (rows, weights, replays), (expected, theirs, none) in zip(*reversed(results), strict=True):
        assert rows == expected and len(rows) == 14
        assert not none and replays >= 2 * 2 * 4  # passes of two layers, of the ramp-up's steps
        assert weights.keys() == theirs.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, theirs[name]), name


def _fails_on_rank_1(rank: int, world: int, flags: list[str]) -> tuple[Any, dict, int]:
    Emulated.fails = 3 if rank == world - 1 else 0
    return _train(rank, world, flags, True)


def test_a_capture_that_fails_on_a_rank_leaves_all_eager(tmp_path: Path, dataset: str):
    # No tensor parallelism: emulated recordings run the layers' collectives, captured ones do not.
    dp2 = ["--zero-stage", "1", "--global-batch-size", "24"]
    flags = [*RUN, *LLAMA, *dp2, "--data-path", dataset, "--train-iters", "8"]
    eager = dist.run(_train, 2, [*flags, "--run-dir", str(tmp_path / "eager")], False)
    failed = dist.run(_fails_on_rank_1, 2, [*flags, "--run-dir", str(tmp_path / "failed")])
    for (rows, weights, replays), (expected, theirs, _) in zip(failed, eager, strict=True):
        assert rows == expected and len(rows) == 8
        assert not replays
        for name, weight in weights.items():
            assert torch.equal(weight, theirs[name]), name


def test_graphs_are_let_go_where_a_step_runs_eagerly(monkeypatch):
    """It needs the memory; and a profiler that asks for an eager step gets one."""
    from types import SimpleNamespace

    from megasparse.megatron.graphs.layer_graphs import LayerGraphs
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.controller import SparsityController
    from megasparse.sparsity.recipe import make_recipe

    controller = SparsityController(make_recipe("dense"), Clock(1, 10))
    grid: Any = SimpleNamespace(device=torch.device("cpu"))
    asked = False
    monkeypatch.setattr(SparsityController, "asked", property(lambda _: asked))

    def begun() -> LayerGraphs:
        """With graphs of steps without metrics."""
        graphs = LayerGraphs([], controller, grid, None, make_recorder=Emulated)
        graphs.begin_step([0])
        graphs.end_step()
        graphs._sets = {False: kept}
        return graphs

    kept: Any = [SimpleNamespace(pairs=[])]
    monkeypatch.setattr(Emulated, "controller", controller)
    graphs = begun()
    graphs.begin_step([0])
    assert graphs._active is kept and graphs._sets
    graphs.paused = True
    graphs.begin_step([0])
    assert graphs._active is None and not graphs._sets
    graphs, asked = begun(), True  # the first step with metrics
    graphs.begin_step([0])
    assert graphs._active is None and not graphs._sets
