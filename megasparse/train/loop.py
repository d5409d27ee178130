"""The training loop: steps, evaluation, checkpoints, metrics, and the final report."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from megasparse.config import RunConfig, dump_yaml, padded_vocab_size
from megasparse.errors import CheckpointError, ConfigError
from megasparse.log import logger
from megasparse.megatron.consistency import check_replicas
from megasparse.megatron.grid import Grid
from megasparse.sparsity.recipe import SparsityRecipe, make_recipe
from megasparse.train import checkpoint, report
from megasparse.train.build import build_engine
from megasparse.train.data import RunData, batches, samples_digest
from megasparse.train.generate import sample_text
from megasparse.train.metrics import MetricsWriter, ProgressLine, read_metrics


def recipe_of(config: RunConfig) -> SparsityRecipe:
    """The run's recipe: the preset with the flags that were given."""
    sparsity = config.sparsity
    return make_recipe(
        sparsity.sparsity_recipe,
        mask_update_interval=sparsity.mask_update_interval,
        masked_decay=sparsity.masked_decay,
        masked_decay_ramp_iters=sparsity.masked_decay_ramp_iters,
        mvue=sparsity.mvue,
        dense_warmup_fraction=sparsity.dense_warmup_fraction,
        dense_tail_fraction=sparsity.dense_tail_fraction,
        simulate_fp8=sparsity.simulate_fp8,
    )


class Trainer:
    """One run on this rank.

    Args:
        config: resolved.
        grid: this rank's place.
        data: checked and indexed.
    """

    def __init__(self, config: RunConfig, grid: Grid, data: RunData) -> None:
        self.config, self.grid, self.data = config, grid, data
        self.recipe = recipe_of(config)
        self.save_root = Path(config.checkpoint.save or "")
        reader = self._find_checkpoint()
        vocabulary = padded_vocab_size(data.vocab_size, config)
        self.engine = build_engine(config, grid, self.recipe, vocabulary)
        self.controller = self.engine.controller
        if reader is not None:
            checkpoint.load(self.engine, reader)
            logger.info("continuing %s at step %d", reader.folder, self.controller.clock.step)
        self._figures: dict[str, dict[str, float]] = {}
        self._figures_at = -1
        self._describe(self.engine.model)

    def run(self) -> None:
        """Train to the end (or to `exit_interval`), leaving metrics, checkpoint and report."""
        train, clock = self.config.train, self.controller.clock
        run_dir = Path(self.config.checkpoint.run_dir)
        writer = None
        if self.grid.rank == 0:
            (run_dir / "config.yaml").write_text(dump_yaml(self.config))
            assert self.config.logging.tensorboard_dir is not None
            board = Path(self.config.logging.tensorboard_dir)
            writer = MetricsWriter(run_dir, board, clock.step)
        line = ProgressLine(train.train_iters, clock.step)
        assert train.global_batch_size is not None
        stream = batches(
            self.data.streams["train"],
            self.config,
            self.grid,
            clock.step * train.global_batch_size,
        )
        saved = clock.step
        while clock.step < train.train_iters:
            row, layers = self._step(stream)
            if writer is not None:
                writer.write(row, layers)
                if row["step"] % self.config.logging.log_interval == 0 or row["step"] == 1:
                    line.show(row)
            if self._save_due():
                self._save()
                saved = clock.step
            if train.exit_interval and clock.step % train.exit_interval == 0:
                break
        if saved != clock.step:
            self._save()
        if writer is not None:
            writer.close()
        if clock.step == train.train_iters:
            self._finish(run_dir)

    def _step(self, stream: Any) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """One optimizer step and everything recorded about it."""
        train, clock = self.config.train, self.controller.clock
        assert train.global_batch_size is not None
        first_sample = clock.step * train.global_batch_size
        sparse, decay = self.controller.sparse_now, self.controller.masked_decay()
        begin = time.monotonic()
        result = self.engine.train_step(stream)
        seconds = time.monotonic() - begin
        row = {
            "step": clock.step,
            **dataclasses.asdict(result),
            "consumed_samples": clock.step * train.global_batch_size,
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
        refreshes = int(
            self.grid.sum_over_model(
                torch.tensor(self.controller.refreshes, device=self.grid.device)
            )
        )  # stages may have none
        if shown or refreshes != self._figures_at:
            layers = self._figures = self._layer_figures()
            self._figures_at = refreshes
        for figure in ("flip_rate", "density"):
            values = [one[figure] for one in self._figures.values() if figure in one]
            if values:
                row[figure] = sum(values) / len(values)
        due = logging.eval_interval and clock.step % logging.eval_interval == 0
        if logging.eval_iters and (due or last):
            row["valid_loss"] = self._validate()
        return row, layers

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

    def _validate(self) -> float:
        """Mean loss over the same first samples of the validation split every time."""
        stream = batches(self.data.streams["valid"], self.config, self.grid, 0)
        iterations = self.config.logging.eval_iters * self.engine.accumulation_steps
        return self.engine.evaluate(stream, iterations)

    def _save_due(self) -> bool:
        interval = self.config.checkpoint.save_interval
        return bool(interval) and self.controller.clock.step % interval == 0  # type: ignore[operator]

    def _save(self) -> None:
        folder = checkpoint.save(
            self.engine, self.save_root, self.data.digests, self.config.checkpoint.keep_last
        )
        logger.info("saved %s", folder)

    def _find_checkpoint(self) -> checkpoint.CheckpointReader | None:
        """What the run starts from: nothing, or a verified checkpoint of the same run."""
        settings = self.config.checkpoint
        reader: checkpoint.CheckpointReader | None
        if settings.load is not None:
            reader = self.grid.first_rank_first(lambda: _require(Path(settings.load or "")))
        elif settings.resume:
            reader = self.grid.first_rank_first(lambda: checkpoint.newest_valid(self.save_root))
        elif checkpoint.list_steps(self.save_root):
            raise ConfigError(
                f"save: {self.save_root} already holds checkpoints of a run; continue it with "
                "--resume, or choose another --run-dir"
            )
        else:
            return None
        if reader is not None:
            _check_same_run(reader, self.config, self.data.digests)
        return reader

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

    def _finish(self, run_dir: Path) -> None:
        """Sample, check the saved checkpoint, print the table."""
        logging, tokenizer = self.config.logging, self.data.tokenizer
        sample = None
        if logging.sample_tokens and tokenizer is not None:
            sample = sample_text(
                self.engine.logits,
                tokenizer,
                logging.sample_prompt,
                logging.sample_tokens,
                self.config.model.seq_length,
                self.config.train.seed,
                self.grid.device,
            )
        if self.grid.rank != 0:
            return
        # A run that was complete when it was loaded has saved nothing of its own.
        saved = checkpoint.list_steps(self.save_root)
        reader = _require(self.save_root if saved else Path(self.config.checkpoint.load or ""))
        steps = self.config.train.train_iters
        tensors = report.check_sparsity(reader, self.recipe, steps)
        places = {
            "checkpoint": reader.folder,
            "metrics": run_dir / "metrics.jsonl",
            "TensorBoard": Path(logging.tensorboard_dir or ""),
            "configuration": run_dir / "config.yaml",
        }
        rows = read_metrics(run_dir / "metrics.jsonl")
        logger.info(
            report.format_report(reader.meta["step"], rows, tensors, self.recipe, places, sample)
        )
        report.require_sparsity(tensors, self.recipe, reader.meta["step"], steps)


def _require(root: Path) -> checkpoint.CheckpointReader:
    reader = checkpoint.newest_valid(root)
    if reader is None:
        raise CheckpointError(f"{root}: holds no checkpoint")
    return reader


# What a resumed run may not change silently: it would be another run.
_FIXED = {
    "model": None,
    "train": ("global_batch_size", "seed", "train_iters", "lr", "min_lr", "lr_decay_style",
              "lr_decay_iters", "lr_warmup_iters", "bf16"),
    "sparsity": None,
}  # fmt: skip


def _check_same_run(
    reader: checkpoint.CheckpointReader, config: RunConfig, digests: dict[str, str]
) -> None:
    """Refuse to continue a run with other sizes, data, schedule or recipe."""
    saved = reader.meta["config"]
    for group, names in _FIXED.items():
        for name, value in dataclasses.asdict(getattr(config, group)).items():
            if (names is None or name in names) and saved[group].get(name) != value:
                raise ConfigError(
                    f"{reader.folder} was trained with {name} {saved[group].get(name)!r}, "
                    f"this run has {value!r}"
                )
    for name, digest in reader.meta["digests"].items():
        if digests.get(name) != digest:
            raise ConfigError(
                f"{reader.folder} was trained on {name} with digest {digest}, "
                f"this run has {digests.get(name)}"
            )
