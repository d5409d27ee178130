"""The training loop: steps, evaluation, checkpoints, metrics, and the final report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.config import RunConfig, dump_yaml, padded_vocab_size
from megasparse.errors import EXIT_PREEMPTED
from megasparse.log import logger
from megasparse.megatron.consistency import check_replicas
from megasparse.megatron.grid import Grid
from megasparse.train import checkpoint
from megasparse.train.build import build_engine
from megasparse.train.control import Control
from megasparse.train.data import RunData, batches, samples_digest
from megasparse.train.engine import StepResult
from megasparse.train.faults import Faults
from megasparse.train.folder import RunFolder, finish
from megasparse.train.generate import sample_text
from megasparse.train.initial import start
from megasparse.train.metrics import MetricsWriter, ProgressLine
from megasparse.train.numerics import NonFiniteStep
from megasparse.train.precheck import recipe_of
from megasparse.train.state import LoopState
from megasparse.train.stop import StopRequest, describe
from megasparse.train.watchdog import STARTING


@dataclass
class Context:
    """What a run has around it: the other ranks, reasons to stop, faults, and a watchdog.

    Attributes:
        tick: told what begins, and the multiple of the hang timeout that it may take.
    """

    control: Control
    stop: StopRequest
    faults: Faults
    tick: Callable[..., None]


class Trainer:
    """One run on this rank.

    Args:
        config: resolved.
        grid: this rank's place.
        data: checked and indexed.
        context: of the run.
    """

    def __init__(self, config: RunConfig, grid: Grid, data: RunData, context: Context) -> None:
        self.config, self.grid, self.data, self.context = config, grid, data, context
        self.recipe = recipe_of(config)
        self.folder = RunFolder(config, context.control)
        reader = self.folder.find_checkpoint(data.digests)
        vocabulary = padded_vocab_size(data.vocab_size, config)
        self.engine = build_engine(
            config, grid, self.recipe, vocabulary, context.faults, context.tick, data.vocab_size
        )
        self.controller = self.engine.controller
        self.state = LoopState()
        if reader is not None:
            checkpoint.load(self.engine, reader)
            self.state = LoopState.of(reader, config)
            logger.info("continuing %s at step %d", reader.folder, self.controller.clock.step)
        start(self.engine, context.control, data.digests, fresh=reader is None)
        self.saver = self.folder.make_saver(self._passed)
        self._figures: dict[str, dict[str, float]] = {}
        self._figures_at = -1
        self._describe(self.engine.model)

    def run(self) -> int:
        """Train until the end or a reason to stop; metrics, checkpoint and report stay behind.

        Returns:
            0 when all steps are done, else EXIT_PREEMPTED.
        """
        run_dir = Path(self.config.checkpoint.run_dir)
        writer = None
        if self.grid.rank == 0:
            (run_dir / "config.yaml").write_text(dump_yaml(self.config))
            assert self.config.logging.tensorboard_dir is not None
            board = Path(self.config.logging.tensorboard_dir)
            writer = MetricsWriter(run_dir, board, self.controller.clock.step)
        try:
            reason = self._train(writer)
            if self.saver.saved_step != self.controller.clock.step:
                self._save(final=True)
            self.saver.finish(final=True)
            if writer is not None:
                writer.close()
            done = self.controller.clock.step == self.config.train.train_iters
            if done and self.state.pending_row is None:
                self.context.tick("final report", 0.0)
                finish(self.config, self.recipe, self.grid.rank, self._sample())
                return 0
            logger.info("stopped at step %d (%s)", self.controller.clock.step, reason)
            return EXIT_PREEMPTED
        finally:
            self.folder.release()

    def _train(self, writer: MetricsWriter | None) -> str:
        """Steps until the end or a reason to stop, in words."""
        train, clock = self.config.train, self.controller.clock
        line = ProgressLine(train.train_iters, clock.step)
        assert train.global_batch_size is not None
        first = clock.step * train.global_batch_size + self.state.sample_offset
        stream = batches(self.data.streams["train"], self.config, self.grid, first)
        if self.state.pending_row is not None and not self._complete(writer, line):
            return "an evaluation was interrupted"
        self.context.tick("the first step", STARTING)
        while clock.step < train.train_iters:
            if reason := self._reason_to_stop():
                return describe(reason)
            row, layers = self._step(stream)
            if self.state.pending_row is None:
                self._record(writer, line, row, layers)
            self.context.faults.step = clock.step
            self.context.faults.at("step_end")
            if self._save_due():
                if writer is not None:
                    writer.flush()
                self._save()
            if train.exit_interval and clock.step % train.exit_interval == 0:
                return "--exit-interval"
            if self.state.pending_row is not None:
                return "an evaluation was interrupted"
        return "done"

    def _reason_to_stop(self) -> int:
        """Agreed by all ranks between two steps; a background save that ended is published."""
        duration = self.config.train.exit_duration_in_mins
        reason = self.context.stop.reason(duration)
        # The time limit is sent as the largest value: a signal and it are both a reason.
        timed_out, number, writing = self.context.control.agree(
            [int(reason < 0), max(reason, 0), int(self.saver.writing)]
        )
        if self.saver.pending and not writing:
            self.saver.finish()
        self.folder.refresh()
        return number or -timed_out

    def _record(
        self,
        writer: MetricsWriter | None,
        line: ProgressLine,
        row: dict[str, Any],
        layers: dict[str, dict[str, float]],
    ) -> None:
        if writer is None:
            return
        writer.write(row, layers)
        if row["step"] % self.config.logging.log_interval == 0 or row["step"] == 1:
            line.show(row)

    def _complete(self, writer: MetricsWriter | None, line: ProgressLine) -> bool:
        """Make up for the evaluation that the run before this one had no time for."""
        row, self.state.pending_row = self.state.pending_row, None
        assert row is not None
        row["valid_loss"] = self._validate()
        if row["valid_loss"] is None:
            self.state.pending_row = row
            return False
        self.saver.saved_step = None  # the checkpoint of this step still has the row
        self._record(writer, line, row, {})
        return True

    def _step(self, stream: Any) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """One optimizer step and everything recorded about it."""
        train, clock = self.config.train, self.controller.clock
        assert train.global_batch_size is not None
        first_sample = clock.step * train.global_batch_size + self.state.sample_offset
        sparse, decay = self.controller.sparse_now, self.controller.masked_decay()
        begin = time.monotonic()
        result = self._train_step(stream)
        seconds = time.monotonic() - begin
        teaching = self.engine.distillation
        parts: dict[str, float | None] = dict(teaching.take_parts()) if teaching else {}
        if result.loss is None:  # the step was left out, and so are its parts
            parts = dict.fromkeys(parts)
        row = {
            "step": clock.step,
            **dataclasses.asdict(result),
            **parts,
            "consumed_samples": first_sample + train.global_batch_size,
            "sparse": sparse,
            "preparations": self.controller.preparations(clock.step - 1),
            "masked_decay": decay,
            "tokens_per_second": train.global_batch_size * self.config.model.seq_length / seconds,
            "samples": samples_digest(
                self.data.streams["train"], first_sample, train.global_batch_size
            ),
        }
        interval = self.config.parallel.replica_check_interval
        if interval and clock.step % interval == 0:
            check_replicas(self.engine.model, self.controller, self.grid, clock.step)
        logging = self.config.logging
        last = clock.step == train.train_iters
        shown = clock.step % logging.log_interval == 0 or clock.step == 1 or last
        layers: dict[str, dict[str, float]] = {}
        refreshes = self._refreshes()
        if shown or refreshes != self._figures_at:
            layers = self._figures = self._layer_figures()
            self._figures_at = refreshes
            self.state.note_flips(clock.step, refreshes, self._figures)
        for figure in ("flip_rate", "density"):
            values = [one[figure] for one in self._figures.values() if figure in one]
            if values:
                row[figure] = sum(values) / len(values)
        due = logging.eval_interval and clock.step % logging.eval_interval == 0
        if logging.eval_iters and (due or last):
            row["valid_loss"] = self._validate()
            if row["valid_loss"] is None:
                self.state.pending_row = row
            self.context.tick("after an evaluation", STARTING)
        return row, layers

    def _train_step(self, stream: Any) -> StepResult:
        """One step; one with a NaN or infinity is left out, as often as is allowed."""
        try:
            result = self.engine.train_step(stream)
        except NonFiniteStep as error:
            self.state.skipped_steps += 1
            allowed = self.config.train.max_skipped_steps
            if self.state.skipped_steps > allowed:
                raise
            logger.warning(
                "%s; left out (%d in a row, %d allowed)", error, self.state.skipped_steps, allowed
            )
            self.controller.clock.step += 1
            return StepResult(None, None, error.lr)
        self.state.skipped_steps = 0
        return result

    def _refreshes(self) -> int:
        """Mask refreshes so far in the whole model (a stage may have none); in any layout alike."""
        here = torch.tensor(self.controller.refreshes, device=self.grid.device)
        return int(self.grid.sum_over_model(here)) // self.grid.tp_size

    def _layer_figures(self) -> dict[str, dict[str, float]]:
        """Density and (once measured) flip rate by layer of the whole model, in order."""
        reports = self.controller.report()
        counts = torch.tensor(
            [[r.flips or 0, r.nonzeros, r.numel] for r in reports],
            dtype=torch.int64,
            device=self.grid.device,
        )
        totals = self.grid.sum_over_tp(counts).tolist() if reports else []
        figures = {}
        for r, (flips, nonzeros, numel) in zip(reports, totals, strict=True):
            figures[r.name] = {"density": nonzeros / numel}
            if r.flips is not None:
                figures[r.name]["flip_rate"] = flips / numel
        stages = self.grid.gather_over_pp(figures)
        return {name: one for stage in stages for name, one in stage.items()}

    def _validate(self) -> float | None:
        """Mean loss over the same first samples of the validation split every time.

        None when the run is to stop: an evaluation may be long, the time to save is short.
        """
        stream = batches(self.data.streams["valid"], self.config, self.grid, 0)
        iterations = self.config.logging.eval_iters * self.engine.accumulation_steps
        stop = self.context.stop
        return self.engine.evaluate(
            stream,
            iterations,
            lambda: any(self.context.control.agree([max(stop.reason(None), 0)])),
        )

    def _save_due(self) -> bool:
        interval = self.config.checkpoint.save_interval
        return bool(interval) and self.controller.clock.step % interval == 0  # type: ignore[operator]

    def _save(self, final: bool = False) -> None:
        clock = self.controller.clock
        self.context.tick(f"save of step {clock.step}", STARTING)
        self.context.faults.step = clock.step
        meta = checkpoint.describe(self.engine, self.data.digests, self.state.to_json())
        meta["consumed_samples"] += self.state.sample_offset
        self.saver.save(clock.step, checkpoint.collect(self.engine), meta, final)
        self.context.tick("after a save", STARTING)

    def _passed(self, point: str) -> None:
        """A save has come to a point."""
        self.context.faults.at(point)
        self.context.tick(point, STARTING)

    def _describe(self, model: torch.nn.Module) -> None:
        local = sum(parameter.numel() for parameter in model.parameters())
        recipe = self.recipe
        logger.info(
            "recipe %s: %d sparse layers here, 2:4 in %s; %s parameters here, tp %d, pp %d, dp %d",
            recipe.name,
            len(self.controller.weights),
            ", ".join(recipe.sparse_gemms) or "no GEMM",
            f"{local:,}",
            self.grid.tp_size,
            self.grid.pp_size,
            self.grid.dp_size,
        )

    def _sample(self) -> str | None:
        """A text of the trained model; all ranks take part."""
        logging, tokenizer = self.config.logging, self.data.tokenizer
        if not logging.sample_tokens or tokenizer is None:
            return None
        return sample_text(
            self.engine.logits,
            tokenizer,
            logging.sample_prompt,
            logging.sample_tokens,
            self.config.model.seq_length,
            self.config.train.seed,
            self.grid.device,
        )
