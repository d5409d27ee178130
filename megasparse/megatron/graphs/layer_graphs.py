"""When layers are captured, replayed and let go: the life of CUDA graphs over a run.

Graphs are of a phase of the recipe's schedule and of a kind of step (with metrics measured in it,
or not). The first step of each kind runs eagerly, the next of its kind is captured. They are let go
when the phase changes, when states got other addresses (a loaded checkpoint), when a step is
computed again for what was not finite in it, and when the scales that products assume are no longer
those of the operands (`fp8/scale.py`); the step after that captures anew.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megasparse.config import ResolvedConfig
from megasparse.config.graphs import graphs_refusal
from megasparse.errors import KernelError
from megasparse.log import is_logging_rank, logger, warn_once
from megasparse.megatron.graphs.captured import GraphedLayer, GraphSet
from megasparse.megatron.graphs.recorder import CudaRecorder, Recorder, Replayed
from megasparse.megatron.grid import Grid
from megasparse.progress import progress
from megasparse.sparsity.controller import SparsityController
from megasparse.sparsity.seeds import DeviceSeeds

# Of the used quantizers; below it every replay corrects too many products.
LEAST_SHARE_ASSUMED = 0.8
# Steps from a capture to the first look at scales, which waits for the device; then doubled.
FIRST_PATIENCE = 4


class LayerGraphs:
    """The graphs of a rank's layers.

    Where layers need a context around their forward pass, or graphs are not taken in turns, a
    subclass says so (`around`, `slot_of`).

    Args:
        layers: Transformer layers, in the order of execution, and whether each is recomputed.
        controller: of their sparsity.
        grid: this rank's place.
        places: where each parameter's gradients are added up over the micro-batches of a step;
            None: they leave every micro-batch's backward pass.
        slots: micro-batches that are under way at a time.
        make_recorder: of graphs on a device.
    """

    def __init__(
        self,
        layers: Sequence[tuple[torch.nn.Module, bool]],
        controller: SparsityController,
        grid: Grid,
        places: Mapping[torch.nn.Parameter, torch.Tensor] | None,
        slots: int = 1,
        make_recorder: Callable[[torch.device], Recorder] = CudaRecorder,
    ) -> None:
        self._layers = [GraphedLayer(layer, recompute) for layer, recompute in layers]
        self._slots = slots
        self._controller, self._grid, self._places = controller, grid, places
        self._make_recorder = make_recorder
        self._recorder = make_recorder(grid.device)
        # By whether metrics are measured, of each slot.
        self._sets: dict[bool, list[GraphSet]] = {}
        self._warm: set[bool] = set()
        self._refill = self._refills()
        self._refresh = Replayed(controller.refresh)
        self._update: Replayed | None = None
        self._phase: tuple[int, int] | None = None  # of the schedule, and moves of the states
        self._active: list[GraphSet] | None = None
        self._look_at, self._patience = 0, FIRST_PATIENCE
        self._refusal: str | None = None
        self.paused = False  # steps run eagerly, as a profiler asks for
        controller.seeds = DeviceSeeds(controller.clock, controller.layers, grid.device, slots)

    def begin_step(self, micro_batches: Sequence[int]) -> None:
        """Before the first micro-batch of a training step: operands, seeds, and the graphs to use.

        Args:
            micro_batches: their numbers over all data-parallel ranks, in this rank's order.
        """
        controller = self._controller
        assert controller.seeds is not None
        phase = (controller.span.number, controller.moves)
        if phase != self._phase:
            self.let_go()
            self._warm.clear()
            self._refill = self._refills()
            self._refresh = Replayed(controller.refresh)
            self._update = None
        with controller.timer.span("preparation"):
            controller.begin_step(lambda: self._refresh(self._recorder))
            if controller.has_operands:
                self._refill[controller.asked](self._recorder)
                controller.refill_experts()
        self._phase = (controller.span.number, controller.moves)
        controller.seeds.begin_step(micro_batches)
        kind = controller.asked
        ready = self._refusal is None and not self.paused
        if ready and kind not in self._sets and kind in self._warm:
            self._capture(kind)
        if kind not in self._warm or self.paused:
            self.let_go()  # an eager step needs the memory
        self._active = self._sets.get(kind)

    def begin_micro_batch(self, number: int) -> None:
        """Before the forward pass of this rank's `number`-th micro-batch of the step."""
        controller, slot = self._controller, self.slot_of(number)
        assert controller.seeds is not None
        controller.clock.slot = slot
        controller.seeds.begin_micro_batch(number, slot)
        self._use(None if self._active is None else self._active[slot])

    def update(self, body: Callable[[], None]) -> None:
        """The optimizer's update, always the same function; captured at its second call."""
        if self._update is None:
            self._update = Replayed(body)
        self._update(self._recorder)

    def end_step(self) -> None:
        """After a step; a collective call of the stage where scales are looked at."""
        controller = self._controller
        self._warm.add(controller.asked)
        self._active = None
        self._use(None)
        scaling = controller.fp8
        if scaling is None or not self._sets or controller.clock.step < self._look_at:
            return
        share = torch.tensor([-scaling.share_assumed()], device=self._grid.device)
        if -float(self._grid.max_over_stage(share)) < LEAST_SHARE_ASSUMED:
            self.let_go()
        self._patience *= 2
        self._look_at = controller.clock.step + self._patience

    def slot_of(self, number: int) -> int:
        """Which of the slots this rank's `number`-th micro-batch of a step takes."""
        return number % self._slots

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """A context for the forward pass of a layer, when it is captured."""
        return contextlib.nullcontext()

    def let_go(self) -> None:
        """Drop all graphs, and the memory that they hold."""
        self._active = None
        self._use(None)
        if self._sets:
            self._drop()

    def _drop(self) -> None:
        self._sets.clear()
        self._recorder = self._make_recorder(self._grid.device)
        if self._controller.fp8 is not None:
            self._controller.fp8.host_follows = True
            self._controller.fp8.assume()

    def close(self) -> None:
        """Drop every graph, for good."""
        self.let_go()
        self._refill = self._refills()
        self._refresh = Replayed(self._controller.refresh)
        self._update = None
        self._refusal = "the run has ended"

    def _refills(self) -> dict[bool, Replayed]:
        """Making the operands, by whether metrics are measured."""
        return {kind: Replayed(self._controller.refill) for kind in (False, True)}

    def _capture(self, kind: bool) -> None:
        reasons = [reason for layer in self._layers if (reason := layer.refusal())]
        if reasons:
            self._refusal = reasons[0]
            warn_once("CUDA graphs are not used: %s", reasons[0])
            return
        controller, begin = self._controller, time.monotonic()
        if controller.fp8 is not None:
            if not self._sets:
                controller.fp8.assume()
            controller.fp8.host_follows = False
        timed, controller.timer.measuring = controller.timer.measuring, False
        failure = None
        try:
            self._sets[kind], before = self._captured()
        except (RuntimeError, KernelError) as error:  # out of memory, among others
            failure = str(error).partition("\n")[0]
        finally:
            controller.timer.measuring = timed
            controller.clock.slot = 0
        if self._failed(failure):
            return
        self._look_at = max(self._look_at, controller.clock.step + self._patience)
        what = "the sparse phase" if controller.sparse_now else "the dense phase"
        if sum(phase.recipe.is_sparse for phase in controller.recipe.phases) > 1:
            what = f"phase {controller.span.number + 1}"
        what += ", steps with metrics" if kind else ""
        parts = sum(not layer.whole for layer in self._layers)
        logger.info(
            "CUDA graphs: %d layers captured%s for %s in %.1f s, %.2f GiB",
            len(self._layers),
            f", of {parts} with experts the attention alone," if parts else "",
            what,
            time.monotonic() - begin,
            (torch.cuda.memory_reserved() - before) / 2**30,
        )

    def _captured(self) -> tuple[list[GraphSet], int]:
        """The graphs of each slot, and the bytes that were reserved before."""
        sets: list[GraphSet] = []
        clock = self._controller.clock
        shown = progress(
            desc="capturing layers",
            total=2 * len(self._layers) * self._slots,
            unit="pass",
            enabled=is_logging_rank(),
            leave=False,
        )
        with shown, self._recorder.prepared():
            before = torch.cuda.memory_reserved()
            for clock.slot in range(self._slots):
                sets.append(
                    GraphSet(
                        self._layers,
                        self._places,
                        self._recorder,
                        self.around,
                        lambda: shown.update(1),
                    )
                )
        return sets, before

    def _failed(self, failure: str | None) -> bool:
        """Whether a rank of the stage could not capture: then all of them run eagerly.

        A rank that replays waits in its layers' collectives for replays of the others.
        """
        flag = torch.tensor([failure is not None], dtype=torch.float32, device=self._grid.device)
        if not bool(self._grid.max_over_stage(flag)):
            return False
        self._drop()
        gc.collect()  # what the capture allocated is held by its tensors
        self._refusal = failure or "another rank could not capture its layers"
        warn_once("CUDA graphs are not used: %s", self._refusal)
        return True

    def _use(self, graphs: GraphSet | None) -> None:
        for number, layer in enumerate(self._layers):
            layer.pair = None if graphs is None else graphs.pairs[number]


def refusal(device: torch.device, config: ResolvedConfig, poisoned: bool) -> str | None:
    """Why a run's layers cannot be captured, or None.

    Args:
        poisoned: gradients of parameters are to be poisoned, by hooks.
    """
    if device.type != "cuda":
        return f"the run is on {device.type}"
    return "gradients are to be poisoned" if poisoned else graphs_refusal(config)
