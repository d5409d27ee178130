"""What a run learns of its model between steps: validation losses, tasks, texts that it writes.

All of it is a collective call. Nothing of it changes the run: losses, draws and masks of the steps
that follow are those of a run without.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from megasparse.config import ResolvedConfig, gradient_accumulation_steps
from megasparse.distributed.control_plane import ControlPlane
from megasparse.distributed.events import Events
from megasparse.inference.eval_harness import HarnessTasks, run_tasks
from megasparse.inference.request_scoring import Interrupted, RequestScorer
from megasparse.inference.sampling import sample_text
from megasparse.log import logger
from megasparse.megatron.data.batches import VALID_SET, RunData, batches
from megasparse.megatron.grid import Grid
from megasparse.train.agreement import Agreement
from megasparse.train.engine.layout import Layout

Row = dict[str, Any]


class Evaluations:
    """The evaluations of a run.

    Args:
        config: of the run.
        grid: this rank's place.
        data: of the run.
        control: of all ranks.
        events: called at every point.

    Raises:
        ConfigError: a task is not known, or its data are not there.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        grid: Grid,
        data: RunData,
        control: ControlPlane,
        events: Events,
    ) -> None:
        self._config, self._grid, self._data = config, grid, data
        self._control, self._events = control, events
        self._tasks: HarnessTasks | None = None  # on rank 0
        if config.logging.eval_harness_tasks:
            control.on_rank_zero(self._load_tasks)

    def _load_tasks(self) -> None:
        logging = self._config.logging
        folder = logging.eval_harness_include_path
        self._tasks = HarnessTasks(
            logging.eval_harness_tasks,
            None if folder is None else Path(folder),
            logging.eval_harness_num_fewshot,
            logging.eval_harness_limit,
        )

    def due(self, step: int) -> bool:
        """Whether something is to be put into the row of this step."""
        return self._validation_due(step) or self._tasks_due(step)

    def samples_due(self, step: int) -> bool:
        """Whether texts are to be shown after this step; the report has those of the last."""
        interval = self._config.logging.sample_interval
        last = step == self._config.train.train_iters
        return interval is not None and step % interval == 0 and not last

    def _validation_due(self, step: int) -> bool:
        logging = self._config.logging
        return bool(logging.eval_iters) and self._at(step, logging.eval_interval)

    def _tasks_due(self, step: int) -> bool:
        logging = self._config.logging
        return bool(logging.eval_harness_tasks) and self._at(step, logging.eval_harness_interval)

    def _at(self, step: int, interval: int | None) -> bool:
        """At every multiple of an interval, and at the end."""
        return step == self._config.train.train_iters or bool(interval and step % interval == 0)

    def complete(self, row: Row, layout: Layout, agreement: Agreement) -> bool:
        """Put what is due at a row's step into it.

        Args:
            row: has "step".

        Returns:
            False when the run is to stop: an evaluation may be long, the time to save is short.
        """
        if self._validation_due(row["step"]) and not self._validate(row, layout, agreement):
            return False
        return not self._tasks_due(row["step"]) or self._run_tasks(row, layout, agreement)

    def _validate(self, row: Row, layout: Layout, agreement: Agreement) -> bool:
        """The validation loss; of several sets also each one's, and their mean."""
        row["valid_loss"] = None
        sets = [name for name in self._data.streams if name.startswith(VALID_SET)]
        losses: dict[str, float] = {}
        for name in sets or ["valid"]:
            loss = self._loss_on(name, layout, agreement)
            parts = layout.take_parts() if self._config.model.is_bert else {}
            if loss is None:
                return False
            losses[name.removeprefix(VALID_SET)] = loss
            if not sets:
                row.update({f"valid_{part}": value for part, value in parts.items()})
        row["valid_loss"] = sum(losses.values()) / len(losses)
        if sets:
            row["valid_losses"] = losses
        return True

    def _loss_on(self, name: str, layout: Layout, agreement: Agreement) -> float | None:
        """Mean loss over the same first samples of a validation stream every time; None: stop."""
        logging, train = self._config.logging, self._config.train
        samples = logging.eval_iters * train.global_batch_size
        stream = batches(self._data.streams[name], self._config, self._grid, 0, samples)
        # Of whole batches, whatever the size of the step before.
        steps = gradient_accumulation_steps(self._config, self._grid.world)
        iterations = logging.eval_iters * steps
        numbers = itertools.count()
        return layout.evaluate(stream, iterations, lambda: agreement.in_evaluation(next(numbers)))

    def _run_tasks(self, row: Row, layout: Layout, agreement: Agreement) -> bool:
        tokenizer, step = self._data.tokenizer, row["step"]
        assert tokenizer is not None  # `validate` has seen to it

        def before_batch(number: int) -> bool:
            self._events("evaluate", step, number)
            return agreement.in_evaluation(number)

        self._events("tasks", step)
        scorer = RequestScorer(
            self._control,
            self._grid,
            layout.logits,
            tokenizer.decode,
            tokenizer.eod,
            self._config.model.seq_length,
            self._config.train.micro_batch_size,
            self._config.train.seed,
            before_batch,
            waiting=lambda: self._events("tasks", step),
        )
        try:
            results = run_tasks(self._tasks, scorer, tokenizer)
        except Interrupted:
            return False
        if results:
            row["tasks"] = results
            shown = ", ".join(f"{name} {value:.4f}" for name, value in results.items())
            logger.info("tasks at step %d: %s", step, shown)
        return True

    def samples(self, layout: Layout, step: int) -> list[str]:
        """Texts of the model as it is, one for each prompt; none without a tokenizer."""
        logging, tokenizer = self._config.logging, self._data.tokenizer
        if not logging.sample_tokens or tokenizer is None:
            return []

        def logits(*inputs: Any) -> Any:
            self._events("evaluate", step)
            return layout.logits(*inputs)

        return [
            sample_text(
                logits,
                tokenizer,
                prompt,
                logging.sample_tokens,
                self._config.model.seq_length,
                self._config.train.seed,
                self._grid.device,
            )
            for prompt in logging.sample_prompt
        ]
