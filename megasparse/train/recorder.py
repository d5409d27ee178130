"""What is recorded of each step: which metrics are due, how they become a row, where it goes.

Metrics of the layers and of the time are taken at log steps alone: the step before a log step is
timed, the log step itself is measured. In between a row has what costs nothing, and the flip rates
when masks were refreshed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import write_text
from megasparse.config import ResolvedConfig, dump_yaml, to_dict
from megasparse.config.batches import samples_after
from megasparse.estimate import flops
from megasparse.log import logger
from megasparse.megatron import balance
from megasparse.metrics.schema import ProgressLine
from megasparse.metrics.writers import MetricsWriter
from megasparse.sparsity import schedule
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.timer import PHASES, StepTimer
from megasparse.train import layer_metrics, stragglers
from megasparse.train.engine.base import Engine, StepResult
from megasparse.train.layer_metrics import LayerMetrics
from megasparse.train.profiler import Profiler
from megasparse.train.state import LoopState

Row = dict[str, Any]


class Recorder:
    """The metrics of one run, step by step; `begin`, the step, `end`, on all ranks.

    Args:
        config: of the run.
        engine: of the run, after a checkpoint was loaded.
        recipe: of the run.
        padded_vocab_size: rows of the output layer.
        state: gets the history of flip rates.

    Attributes:
        only_log: steps to log, in place of every `log_interval`-th; None outside of benchmarks.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        engine: Engine,
        recipe: SparsityRecipe,
        padded_vocab_size: int,
        state: LoopState,
    ) -> None:
        self._config, self._engine, self._state = config, engine, state
        self._grid, self._controller = engine.grid, engine.controller
        self._timer: StepTimer = engine.timer
        self._flops = flops.of_run(config, padded_vocab_size, recipe)
        layers = config.model.num_layers
        self._again = flops.layers_recomputed(config.model, config.parallel) / layers
        self._peak = self._peak_tflops()
        self._metrics: LayerMetrics = {}
        self._metrics_at = -1  # refreshes at which they were taken
        self._entries = layer_metrics.entries(self._controller, self._grid)
        # Whether the step under way, and the one before it, are in the sparse phase.
        self._sparse, self._phase, self._phase_before = False, 0, self._last_phase()
        self._stragglers = stragglers.StragglerWatch()
        self.profiler = Profiler(config, engine)
        self.only_log: tuple[int, ...] | None = None
        self._split: list[Any] = []
        self._seconds = 0.0  # of the steps since the log step before
        self._tokens = 0
        self._writer: MetricsWriter | None = None
        clock, train = self._controller.clock, config.train
        end = samples_after(train, train.train_iters - clock.step, clock.samples)
        self._line = ProgressLine(train.train_iters, clock.samples, end, self._grid.world)
        logger.info(
            "a token takes %.4g GFLOP as a dense model, %.4g by the recipe in its sparse phase",
            self._flops.dense / 1e9,
            self._flops.by_recipe / 1e9,
        )

    def open(self) -> None:
        """Write the configuration and open the files, on rank 0."""
        if self._grid.rank != 0:
            return
        run_dir = Path(self._config.checkpoint.run_dir)
        write_text(run_dir / "config.yaml", dump_yaml(self._config))
        step = self._controller.clock.step
        self._writer = MetricsWriter(run_dir, self._config.logging, step, to_dict(self._config))

    def begin(self) -> None:
        """Before a step."""
        number = self._controller.clock.step + 1
        self._sparse = self._controller.sparse_now
        self._phase = self._controller.span.number
        self._split = self._timer.take()
        self._controller.ask(self._is_logged(number))
        self.profiler.begin(number)
        if self._is_logged(number + 1) or self.profiler.running:
            self._timer.start()

    def end(self, result: StepResult, seconds: float, known: Row) -> Row:
        """After a step: its row.

        Args:
            result: of the engine.
            seconds: that it took, until its loss was known.
            known: columns that the loop fills in.
        """
        self._timer.stop()
        self.profiler.end(self._controller.clock.step)
        self._controller.ask(False)
        clock = self._controller.clock
        step, tokens = clock.step, clock.batch * self._config.model.seq_length
        row: Row = {
            "step": step,
            **dataclasses.asdict(result),
            "consumed_samples": clock.samples,
            "global_batch_size": clock.batch,
            **known,
            "preparations": self._controller.preparations(step - 1),
            "tokens_per_second": tokens / seconds,
        }
        self._seconds += seconds
        self._tokens += tokens
        row |= self._layer_metrics(step)
        return row

    def write(self, row: Row) -> None:
        """Hand a row to the files, and to the screen if it is its turn."""
        layers = row.pop("layers", None)
        if self._writer is None:
            return
        self._writer.write(row, layers)
        if row["step"] % self._config.logging.log_interval == 0 or row["step"] == 1:
            self._line.show(row)

    def flush(self) -> None:
        """Lose nothing up to here if the process is killed."""
        if self._writer is not None:
            self._writer.flush()

    def show_samples(self, texts: list[str]) -> None:
        """Texts of the model as it is, to the files and to the screen."""
        step = self._controller.clock.step
        self._keep_samples(texts)
        if self._writer is not None and texts:
            lines = [f"  | {line}" for text in texts for line in text.split("\n")]
            logger.info("%s", "\n".join([f"samples at step {step}:", *lines]))

    def close(self, samples: list[str] | None = None) -> None:
        """The end of the run, with texts of the model."""
        self.profiler.close()
        self._keep_samples(samples or [])
        if self._writer is not None:
            self._writer.close()

    def _keep_samples(self, texts: list[str]) -> None:
        if self._writer is not None and texts:
            prompts = self._config.logging.sample_prompt
            self._writer.samples(self._controller.clock.step, prompts, texts)

    def _is_logged(self, step: int) -> bool:
        if self.only_log is not None:
            return step in self.only_log
        last = self._config.train.train_iters
        return step % self._config.logging.log_interval == 0 or step in (1, last)

    def _layer_metrics(self, step: int) -> Row:
        """What is due of layers, time and throughput; `layers` holds what is new of each layer."""
        refreshes = self._refreshes()
        new: LayerMetrics = {}
        row: Row = {}
        switched = self._phase != self._phase_before
        self._phase_before = self._phase
        measured = self._is_logged(step) or switched
        if measured or self._metrics_at < 0:
            new, row = self._measured(step)
            self._metrics = new
        elif refreshes != self._metrics_at:
            new = layer_metrics.flip_rates(self._controller, self._grid)
            for name, one in new.items():
                self._metrics.setdefault(name, {}).update(one)
        whole = layer_metrics.summary(self._metrics, self._entries)
        if new or refreshes != self._metrics_at:
            self._metrics_at = refreshes
            self._state.note_flips(step, refreshes, whole.get("flip_rate"))
        if measured or self._state.density is None:
            self._state.density = whole.get("density")
        elif "density" in whole:  # a resumed run has measured it; its row is that of any other
            whole["density"] = self._state.density
        kept = whole if self._is_logged(step) else ("flip_rate", "density")
        return {**row, **{key: whole[key] for key in kept if key in whole}, "layers": new}

    def _measured(self, step: int) -> tuple[LayerMetrics, Row]:
        """Metrics of the layers, and what a row has at log steps alone; a collective call."""
        seconds = self._timer.seconds(self._split)
        saved = self._controller.halved_flops_per_token(self._again)
        layers, sums, memory = layer_metrics.measure_all(
            self._engine,
            self._sparse,
            [*(seconds.get(phase, 0.0) for phase in PHASES), saved, *self._own_work(seconds)],
            layer_metrics.peak_memory_gib(self._grid.device),
        )
        if not self._is_logged(step):
            return layers, {}
        world = self._grid.world
        each = self._tokens / self._seconds / world
        self._seconds, self._tokens = 0.0, 0
        of_phases, saved, own = sums[: len(PHASES)], sums[len(PHASES)], sums[len(PHASES) + 1 :]
        executed = self._flops.dense + self._flops.recomputed - saved / self._grid.dp_cp_size
        row: Row = {
            "tokens_per_second_per_gpu": each,
            "tflops": each * self._flops.dense / 1e12,
            "tflops_true": each * executed / 1e12,
            "memory_gib": memory,
        }
        if self._peak is not None:
            row["mfu"] = row["tflops"] / self._peak
        row |= self._balance()
        if seconds:
            row |= {f"time_{p}": total / world for p, total in zip(PHASES, of_phases, strict=True)}
            found = stragglers.slowest(own, world // self._grid.pp_size)
            self._stragglers.look(step, found)
            if found is not None:
                row |= {"time_slowest_rank": found.rank, "time_slowest_ratio": found.ratio}
        return layers, row

    def _balance(self) -> Row:
        """The losses of the router in this step; a collective call."""
        layers = sum(self._config.model.expert_layers)
        if not layers:
            return {}
        return dict(
            balance.losses_of_step(self._grid, layers, self._engine.layout.accumulation_steps)
        )

    def _own_work(self, seconds: dict[str, float]) -> list[float]:
        """Seconds of this rank's own work at its place among all ranks."""
        every = [0.0] * self._grid.world
        every[self._grid.rank] = sum(seconds.get(phase, 0.0) for phase in stragglers.OWN_WORK)
        return every

    def _last_phase(self) -> int | None:
        """The phase of the step before this start; None: there was none."""
        clock = self._controller.clock
        if clock.step == 0:
            return None
        recipe = self._controller.recipe
        return schedule.span_at(recipe, clock.step - 1, clock.train_iters).number

    def _refreshes(self) -> int:
        """Mask refreshes so far in the whole model (a stage may have none); in any layout alike."""
        if self._grid.tp_size * self._grid.pp_size == 1:
            return self._controller.refreshes
        here = torch.tensor(self._controller.refreshes, device=self._grid.device)
        return int(self._grid.sum_over_model(here)) // self._grid.tp_size

    def _peak_tflops(self) -> float | None:
        given = self._config.logging.peak_tflops
        if given is not None or self._grid.device.type != "cuda":
            return given
        gpu = torch.cuda.get_device_name(self._grid.device)
        precision = "bf16" if self._config.train.bf16 else "fp32"
        if self._config.fp8.fp8_format is not None:
            precision = "fp8"
        peak = flops.peak_tflops(gpu, precision)
        if peak is None:
            logger.info(
                "no MFU: the peak of %s in %s is not known, give --peak-tflops", gpu, precision
            )
        else:
            logger.info("MFU is of %g TFLOP/s, the dense %s peak of %s", peak, precision, gpu)
        return peak
