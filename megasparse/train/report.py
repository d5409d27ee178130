"""The table at the end of a run, with the proof of 2:4 read back from the saved checkpoint."""

from __future__ import annotations

import dataclasses
import math
import shlex
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megasparse.checkpoint.proof import (
    TensorReport,
    check_sparsity,
    format_tensors,
    require_sparsity,
)
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import choose
from megasparse.config import ResolvedConfig
from megasparse.config.packaged import SCRIPTS, commands_folder
from megasparse.distributed.control_plane import ControlPlane
from megasparse.log import COMMAND, logger
from megasparse.metrics.schema import read_metrics
from megasparse.sparsity.recipe import SparsityRecipe

SHARERS = 32  # ranks that examine layers: each reads the headers of all files


def format_report(
    step: int,
    rows: list[dict[str, Any]],
    tensors: list[TensorReport],
    recipe: SparsityRecipe,
    places: dict[str, Path],
    samples: list[str],
) -> str:
    """The final table as text.

    Args:
        step: of the checkpoint.
        rows: of metrics.jsonl.
        places: what is where.
        samples: generated texts.
    """
    lines = ["", f"Run finished: recipe {recipe.name}, {step} steps", ""]
    facts = []
    rows = [row for row in rows if row["loss"] is not None]  # without skipped steps
    if rows:
        change = f"{rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}"
        facts.append(("training loss, first and last", change))
    facts += _validation([row for row in rows if row.get("valid_loss") is not None])
    tasks: dict[str, float] = next((row["tasks"] for row in rows[::-1] if row.get("tasks")), {})
    facts += [(name, f"{value:.4f}") for name, value in tasks.items()]
    flips = [row["flip_rate"] for row in rows if row.get("flip_rate") is not None]
    if flips:
        facts.append(("flip rate, start and end", f"{flips[0]:.4f} -> {flips[-1]:.4f}"))
        highest = max((row for row in rows if row.get("flip_rate") is not None), key=_flip_rate)
        facts.append(("flip rate, highest", f"{_flip_rate(highest):.4f} at step {highest['step']}"))
    facts += [(name, str(path)) for name, path in places.items()]
    width = max(len(name) for name, _ in facts)
    lines += [f"  {name:<{width}}  {value}" for name, value in facts]
    if tensors:
        lines += ["", "  Effective weights in the saved checkpoint:"]
        lines += [f"  {line}" for line in format_tensors(tensors)]
    for sample in samples:
        lines += ["", "  Sample of the model:", *(f"  | {line}" for line in sample.splitlines())]
    return "\n".join(lines)


def _validation(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Of the last evaluation; BERT's loss is of masked tokens and of more, or of classes."""
    if not rows:
        return []
    last = rows[-1]
    facts = [("validation loss", f"{last['valid_loss']:.4f}")]
    if last.get("valid_accuracy") is not None:
        return [*facts, ("validation accuracy", f"{last['valid_accuracy']:.4f}")]
    masked = last.get("valid_lm_loss")
    name = "validation perplexity" if masked is None else "perplexity of masked tokens"
    loss = last["valid_loss"] if masked is None else masked
    return [*facts, (name, f"{math.exp(min(loss, 700.0)):.2f}")]


def _flip_rate(row: dict[str, Any]) -> float:
    return float(row["flip_rate"])


def next_commands(config: ResolvedConfig, recipe: SparsityRecipe) -> list[str]:
    """What people do next with a finished run: look at it, try it, take it away."""
    run, shell = config.checkpoint.run_dir, shlex.quote
    plot = f"{_command('plot')} {shell(run)} --output {shell(run + '/curves')}"
    if config.model.is_bert:  # which writes no texts, and is of no Hugging Face architecture
        return [f"tensorboard --logdir {shell(config.logging.tensorboard_dir)}", plot]
    if config.data.tokenizer_model is not None:
        prompt = shell(next(filter(None, config.logging.sample_prompt), "The"))
        second = f"{_command('generate')} --load {shell(run)} --prompt {prompt}"
    else:
        second = plot
    output = f"--input {shell(run)} --output {shell(run + '/exported')}"
    if recipe.is_sparse:
        third = f"{_command('export')} {output}"
    else:
        third = f"{_command('convert')} --from megasparse --to huggingface {output}"
    return [f"tensorboard --logdir {shell(config.logging.tensorboard_dir)}", second, third]


def _command(name: str) -> str:
    """As it is typed here: in a checkout the script, else the command of the package."""
    if commands_folder().name == "commands":
        return f"megasparse {name}"
    return f"python {SCRIPTS[name]}"


def finish(
    config: ResolvedConfig, recipe: SparsityRecipe, control: ControlPlane, samples: list[str]
) -> None:
    """Check the saved checkpoint and print the table; all ranks share the reading.

    Every rank verifies files. Some examine the layers, each of which lies in many files.

    Raises:
        CheckpointError: it is not 2:4 as the recipe promises.
    """
    # A run that was complete when it was loaded has saved nothing of its own.
    reader = choose(Path(config.checkpoint.save), control) or choose(
        Path(config.checkpoint.load or ""), control
    )
    assert reader is not None
    steps, sharers = config.train.train_iters, min(control.world, SHARERS)
    mine: list[TensorReport] = []

    def examine() -> None:
        if control.rank < sharers:
            mine.extend(check_sparsity(reader, recipe, steps, control.rank, sharers))

    control.on_all_ranks(examine)
    collected = control.collect([dataclasses.asdict(report) for report in mine])
    control.on_rank_zero(lambda: _print(config, recipe, reader, collected or [], samples))


def _print(
    config: ResolvedConfig,
    recipe: SparsityRecipe,
    reader: CheckpointReader,
    collected: list[list[dict[str, Any]]],
    samples: list[str],
) -> None:
    """Rank 0: the table of what all ranks have found."""
    in_order = (found for row in zip_longest(*collected) for found in row if found is not None)
    tensors = [TensorReport(**{**found, "shape": tuple(found["shape"])}) for found in in_order]
    run_dir = Path(config.checkpoint.run_dir)
    places = {
        "checkpoint": reader.folder,
        "metrics": run_dir / "metrics.jsonl",
        "TensorBoard": Path(config.logging.tensorboard_dir),
        "configuration": run_dir / "config.yaml",
    }
    rows = read_metrics(run_dir / "metrics.jsonl")
    step = reader.meta["step"]
    logger.info(format_report(step, rows, tensors, recipe, places, samples))
    lines = [f"{COMMAND}{command}" for command in next_commands(config, recipe)]
    logger.info("%s", "\n".join(["", "  Next:", *lines]))
    require_sparsity(tensors, recipe, step, config.train.train_iters)
