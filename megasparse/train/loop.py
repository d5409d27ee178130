"""The training loop: steps, evaluation, checkpoints, metrics, and the final report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.run_directory import RunFolder
from megasparse.config import ResolvedConfig, gradient_accumulation_steps, padded_vocab_size
from megasparse.config.batches import batch_size, steps_within
from megasparse.distributed.control_plane import ControlPlane
from megasparse.distributed.events import Events
from megasparse.distributed.signals import StopRequest, describe
from megasparse.errors import EXIT_PREEMPTED
from megasparse.estimate import expectation
from megasparse.log import logger
from megasparse.megatron.consistency import check_replicas
from megasparse.megatron.data.batches import RunData, batches, samples_digest
from megasparse.megatron.grid import Grid
from megasparse.sparsity.phases import summary
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.train import checkpoint
from megasparse.train.agreement import Agreement
from megasparse.train.build import build_engine
from megasparse.train.engine.base import StepResult
from megasparse.train.engine.step_guard import NonFiniteStep, Poison
from megasparse.train.evaluations import Evaluations
from megasparse.train.initial_weights import WeightSources, put_initial_weights
from megasparse.train.recorder import Recorder, Row
from megasparse.train.report import finish
from megasparse.train.resume import load
from megasparse.train.state import LoopState


@dataclass
class RunServices:
    """What a run has around it.

    Attributes:
        control: the other ranks.
        stop: reasons to stop.
        events: called at every point of the run.
        poison: values to be made NaN or infinite; none but in tests.
        require_own: raises when another run has taken over the folders; on rank 0.
    """

    control: ControlPlane
    stop: StopRequest
    events: Events
    poison: Poison | None = None
    require_own: Callable[[], object] = lambda: None


class Trainer:
    """One run on this rank.

    Args:
        config: of the run.
        grid: this rank's place.
        data: checked and indexed.
        services: of the run.
    """

    def __init__(
        self, config: ResolvedConfig, grid: Grid, data: RunData, services: RunServices
    ) -> None:
        self.config, self.grid, self.data, self.services = config, grid, data, services
        self._events = services.events
        self.recipe = recipe_of(config)
        self.agreement = Agreement(
            services.control, services.stop, config.train.exit_duration_in_mins
        )
        self.folder = RunFolder(config, services.control)
        self._events("load")
        self.evaluations = Evaluations(config, grid, data, services.control, services.events)
        reader = self.folder.find_checkpoint(data.digests)
        if reader is not None and not reader.imported:
            config = self.config = _from_where_it_is(config, reader)
        vocabulary = padded_vocab_size(data.vocab_size, config)
        sources = WeightSources(config, services.control, data.digests, data.vocab_size, reader)
        if grid.device.type == "cuda":
            gpu = torch.cuda.get_device_name(grid.device)
            expectation.tell(config, self.recipe, vocabulary, grid.world, gpu)
        self._events("model")
        self.engine = build_engine(
            config, grid, self.recipe, vocabulary, services.events, services.poison, data.vocab_size
        )
        self.controller = self.engine.controller
        self.state = LoopState()
        self._phase: int | None = None
        if reader is not None and not reader.imported:
            self._events("load")
            load(self.engine, reader, services.control)
            self.state = LoopState.of(reader)
            logger.info("continuing %s at step %d", reader.folder, self.controller.clock.step)
        if put_initial_weights(self.engine, sources):
            self._calibrate()
        self.saver = self.folder.make_saver(self._passed)
        self._describe(self.engine.model)
        self.recorder = Recorder(config, self.engine, self.recipe, vocabulary, self.state)

    def _calibrate(self) -> None:
        """Let Wanda's first masks know the inputs of the weights that the run starts from."""
        wanted, batch = self.config.data.calibration_samples, self.config.train.global_batch_size
        if self.recipe.mask_metric != "wanda" or not wanted:
            return
        # Whole global batches, so that every layout sees the same samples.
        count = -(-wanted // batch)
        stream = batches(self.data.streams["train"], self.config, self.grid, 0)
        steps = gradient_accumulation_steps(self.config, self.grid.world)
        self.engine.calibrate(stream, count * steps)
        logger.info("Wanda's input norms start from %d training samples", count * batch)

    def run(self) -> int:
        """Train until the end or a reason to stop; metrics, checkpoint and report stay behind.

        Returns:
            0 when all steps are done, else EXIT_PREEMPTED.
        """
        try:
            self.recorder.open()
            if self._is_past_the_end():
                return 0
            reason = self._train()
            if self.saver.saved_step != self.controller.clock.step:
                self._save(final=True)
            self.saver.finish(final=True)
            done = self.controller.clock.step == self.config.train.train_iters
            if done and self.state.pending_row is None:
                self._passed("report")
                samples = self.evaluations.samples(self.engine.layout, self.controller.clock.step)
                self.recorder.close(samples)
                finish(self.config, self.recipe, self.services.control, samples)
                return 0
            self.recorder.close()
            logger.info("stopped at step %d (%s)", self.controller.clock.step, reason)
            return EXIT_PREEMPTED
        finally:
            self.engine.layout.close()

    def _is_past_the_end(self) -> bool:
        """Whether the checkpoint has more steps than this run is to have; says so."""
        step, end = self.controller.clock.step, self.config.train.train_iters
        if step <= end:
            return False
        self.recorder.close()
        logger.info(
            "nothing to do: at step %d the run is past its end (--train-iters %d)", step, end
        )
        return True

    def _train(self) -> str:
        """Steps until the end or a reason to stop, in words."""
        train, clock = self.config.train, self.controller.clock
        stream = self.engine.timer.waiting_for(
            batches(self.data.streams["train"], self.config, self.grid, clock.samples)
        )
        if self.state.pending_row is not None and not self._complete():
            return "an evaluation was interrupted"
        if self.agreement.interval > 1:
            logger.info("stops are agreed every %d steps", self.agreement.interval)
        self._passed("first_step")
        if self.grid.device.type == "cuda":
            logger.info("the first step compiles kernels and tunes GEMMs, which can take minutes")
        while clock.step < train.train_iters:
            if reason := self._reason_to_stop():
                return describe(reason)
            row = self._step(stream)
            if self.state.pending_row is None:
                self.recorder.write(row)
                self._show_samples()
            self._passed("step_end")
            if self._save_due():
                self.recorder.flush()
                self._save()
            if train.exit_interval and clock.step % train.exit_interval == 0:
                return "--exit-interval"
            if self.state.pending_row is not None:
                return "an evaluation was interrupted"
        return "done"

    def _show_samples(self) -> None:
        step = self.controller.clock.step
        if self.evaluations.samples_due(step):
            self.recorder.show_samples(self.evaluations.samples(self.engine.layout, step))
            self._passed("evaluated")

    def _reason_to_stop(self) -> int:
        """Agreed by all ranks between two steps; a background save that ended is published."""
        self.services.require_own()
        agreed = self.agreement.at_step(self.controller.clock.step, self.saver.writing)
        if agreed is None:
            return 0
        if not agreed.writing:
            self.saver.advance()
        return agreed.reason

    def _complete(self) -> bool:
        """Make up for the evaluation that the run before this one had no time for."""
        row, self.state.pending_row = self.state.pending_row, None
        assert row is not None
        if not self._evaluate(row):
            self.state.pending_row = row
            return False
        self.saver.saved_step = None  # the checkpoint of this step still has the row
        self.recorder.write(row)
        return True

    def _step(self, stream: Any) -> Row:
        """One optimizer step and everything recorded about it."""
        train, clock = self.config.train, self.controller.clock
        batch = batch_size(train, clock.samples)
        if clock.batch not in (0, batch):
            logger.info("global batch size %d -> %d at step %d", clock.batch, batch, clock.step + 1)
        known: Row = {
            "sparse": self.controller.sparse_now,
            "masked_decay": self.controller.masked_decay(),
        }
        if self.grid.rank == 0:  # which writes it
            known["samples"] = samples_digest(self.data.streams["train"], clock.samples, batch)
        self._tell_phase()
        self.recorder.begin()
        begin = time.monotonic()
        result = self._train_step(stream)
        seconds = time.monotonic() - begin
        parts = self.engine.layout.take_parts()  # of a skipped step they say nothing
        known |= dict.fromkeys(parts) if result.loss is None else parts
        row = self.recorder.end(result, seconds, known)
        interval = self.config.parallel.replica_check_interval
        if interval and clock.step % interval == 0:
            check_replicas(self.engine.model, self.controller, self.grid, clock.step)
        if self.evaluations.due(clock.step):
            if not self._evaluate(row):
                self.state.pending_row = row
            self._passed("evaluated")
        return row

    def _tell_phase(self) -> None:
        """One line when the run begins in, or comes to, a phase of a schedule of several."""
        span, phases = self.controller.span, self.recipe.phases
        if len(phases) == 1 or span.number == self._phase:
            return
        self._phase = span.number
        first, last = span.steps.start + 1, span.steps.stop
        where = f"phase {span.number + 1} of {len(phases)}, steps {first} to {last}"
        logger.info("%s: %s", where, summary(span.recipe))

    def _evaluate(self, row: Row) -> bool:
        return self.evaluations.complete(row, self.engine.layout, self.agreement)

    def _train_step(self, stream: Any) -> StepResult:
        """One step; one with a NaN or infinity is skipped, as often as is allowed."""
        try:
            result = self.engine.train_step(stream)
        except NonFiniteStep as error:
            self.state.skipped_steps += 1
            allowed = self.config.train.max_skipped_steps
            if self.state.skipped_steps > allowed:
                raise
            logger.warning(
                "%s; skipped (%d in a row, %d allowed)", error, self.state.skipped_steps, allowed
            )
            self.controller.clock.advance()
            return StepResult(None, None, error.lr)
        self.state.skipped_steps = 0
        return result

    def _save_due(self) -> bool:
        interval = self.config.checkpoint.save_interval
        return bool(interval) and self.controller.clock.step % interval == 0  # type: ignore[operator]

    def _save(self, final: bool = False) -> None:
        clock = self.controller.clock
        self._passed("save")
        self.services.require_own()
        meta = checkpoint.describe(self.engine, self.data.digests, self.state.to_json())
        meta["state"]["vocab_size"] = self.data.vocab_size
        if self.data.chat_template is not None:
            meta["state"]["chat_template"] = self.data.chat_template
        self.saver.save(clock.step, checkpoint.collect(self.engine), meta, final)
        self._passed("saved")

    def _passed(self, point: str) -> None:
        """The run, or the save that is being written, has come to a point."""
        self.services.events(point, self.controller.clock.step)

    def _describe(self, model: torch.nn.Module) -> None:
        local = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        recipe = self.recipe
        logger.info(
            "recipe %s: %d sparse layers here, 2:4 in %s%s; %s parameters here, "
            "tp %d, cp %d, pp %d, dp %d",
            recipe.name,
            len(self.controller.weights),
            ", ".join(recipe.sparse_gemms) or "no GEMM",
            "" if self.controller.fp8 is None else ", all linears in FP8",
            f"{local:,}",
            self.grid.tp_size,
            self.grid.cp_size,
            self.grid.pp_size,
            self.grid.dp_size,
        )


def _from_where_it_is(config: ResolvedConfig, reader: CheckpointReader) -> ResolvedConfig:
    """The steps of a run of `train_samples` from its checkpoint on, whatever the batches before."""
    train, meta = config.train, reader.meta
    if train.train_samples is None:
        return config
    more = steps_within(train, meta["consumed_samples"], train.train_samples)
    train = dataclasses.replace(train, train_iters=meta["step"] + more)
    return dataclasses.replace(config, train=train)
