"""Which package does a source file come from? BERT fine-tuned, dense beside 2:4.

    python -m tools.experiments.classify_sources --output runs/classify

Makes texts of the packages that this Python has, trains a tokenizer, pre-trains a dense BERT and
one with the recipe FST (2:4 to its end), and fine-tunes a head for the packages: on each of them,
and on weights that were never trained. Writes results.md with the table, and prints it.

A run that is finished is not repeated; one that was interrupted goes on from its checkpoint. Flags
after `--` go to every pre-training run (`-- --train-iters 2000`).
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megasparse.atomic_files import write_text
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import choose
from megasparse.cli import guarded, markdown_table
from megasparse.config import load_config, resolve
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError, MegasparseError
from megasparse.metrics.schema import read_metrics
from megasparse.train.main import pretrain
from tools import preprocess_data, train_tokenizer
from tools.bench.parts.short_runs import stand_alone
from tools.experiments.finished import hardware
from tools.experiments.run_queue import ROOT, split_flags
from tools.experiments.source_texts import Sources, make_texts

FST = ["--sparsity-recipe", "fst", "--dense-tail-fraction", "0"]
RECIPES = {"dense": [], "fst": FST}
# Name: the recipe, and the run whose weights it starts from.
FINE_TUNED = {
    "dense": ("dense", "dense"),
    "FST": ("fst", "fst"),
    "dense, not pre-trained": ("dense", None),
}
BATCH, EPOCHS = 32, 4


@dataclass(frozen=True)
class Work:
    """The experiment: its folder, its text, how long it trains."""

    output: Path
    sources: Sources
    flags: list[str]
    command: str

    def common(self) -> list[str]:
        """Flags of every run."""
        model = ROOT / "configs" / "models" / "bert_tiny.yaml"
        return ["--config", str(model), "--tokenizer-model", str(self.output / "tokenizer.model")]

    def folder(self, kind: str, name: str) -> Path:
        return self.output / kind / name.replace(", ", "-").replace(" ", "-")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    own, flags = split_flags(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=6, help="packages (default: %(default)s)")
    parser.add_argument(
        "--pieces", type=int, default=320, help="of each to train on (default: %(default)s)"
    )
    parser.add_argument(
        "--corpus-characters",
        type=int,
        default=400_000,
        help="of each to pre-train on, at most (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(own)
    command = shlex.join(["python", "-m", "tools.experiments.classify_sources", *argv])
    return guarded("classify_sources.py", lambda: print(run(args, flags, command)))


def run(args: argparse.Namespace, flags: list[str], command: str) -> str:
    """Everything; the table."""
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    stand_alone()
    valid = BATCH * 2  # of each package: whole batches
    sources = make_texts(
        args.output, args.classes, args.pieces, valid, args.corpus_characters, args.seed
    )
    work = Work(args.output, sources, [*flags, "--seed", str(args.seed)], command)
    _tokens(work)
    for recipe, own in RECIPES.items():
        data = ["--data-path", str(work.output / "data_text_document")]
        _train(work.folder("pretrain", recipe), [*work.common(), *data, *own, *work.flags])
    steps = EPOCHS * (work.sources.pieces[0] // BATCH)
    for name, (recipe, start) in FINE_TUNED.items():
        given = ["--num-classes", str(args.classes), "--data-path", "--train-iters", str(steps)]
        given += ["--train-data", str(sources.train), "--valid-data", str(sources.valid)]
        given += ["--lr", "5e-4", "--eval-interval", str(steps), "--seed", str(args.seed)]
        given += ["--eval-iters", str(sources.pieces[1] // BATCH), *RECIPES[recipe]]
        if "--bf16" in work.flags:  # as it was pre-trained
            given.append("--bf16")
        if start is not None:
            given += ["--load", str(work.folder("pretrain", start)), "--finetune"]
        _train(work.folder("finetune", name), [*work.common(), *given])
    text = table(work)
    write_text(work.output / "results.md", text + "\n")
    return text


def _tokens(work: Work) -> None:
    """Tokenizer and dataset of the corpus, unless they are there."""
    tokenizer, prefix = work.output / "tokenizer.model", work.output / "data"
    if (work.output / "data_text_document.idx").exists():
        return
    names = ["--input", str(work.sources.corpus), "--overwrite"]
    steps = (
        (train_tokenizer, ["--output", str(tokenizer), "--vocab-size", "1024"]),
        (preprocess_data, ["--output-prefix", str(prefix), "--tokenizer-model", str(tokenizer)]),
    )
    for tool, arguments in steps:
        if code := tool.main([*names, *arguments]):
            raise MegasparseError(f"{tool.__name__} ended with exit code {code}")


def _train(folder: Path, flags: list[str]) -> None:
    """A run in this process, unless it is finished."""
    arguments = [*flags, "--run-dir", str(folder), "--resume"]
    print(f"{folder}: {shlex.join(arguments)}", flush=True)
    if code := pretrain(resolve(load_config(arguments), 1)):
        raise MegasparseError(f"{folder}: ended with exit code {code}")


def table(work: Work) -> str:
    """The results as a page."""
    rows = []
    for name, (_, start) in FINE_TUNED.items():
        tuned = work.folder("finetune", name)
        last = read_metrics(tuned / "metrics.jsonl")[-1]
        before = "-"
        if start is not None:
            folder = work.folder("pretrain", start)
            masked = read_metrics(folder / "metrics.jsonl")[-1]["valid_lm_loss"]
            before = f"{math.exp(masked):.2f}"
        kept = "-" if start != "fst" else _kept(work.folder("pretrain", start), tuned)
        accuracy = f"{100 * last['valid_accuracy']:.1f} %"
        rows.append((name, before, accuracy, f"{last['valid_loss']:.3f}", kept))
    header = ("model", "perplexity of masked tokens", "accuracy", "validation loss", "masks")
    steps = read_metrics(work.folder("pretrain", "dense") / "metrics.jsonl")[-1]["step"]
    train, valid = work.sources.pieces
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        "# Which package does a source file come from? BERT, dense beside 2:4",
        "",
        f"{today}, {hardware()}, Python {platform.python_version()}. Made by",
        "",
        f"    {work.command}",
        "",
        f"Classes: {', '.join(work.sources.packages)}; chance is "
        f"{100 / len(work.sources.packages):.1f} %.",
        f"`configs/models/bert_tiny.yaml`, {steps} steps of pre-training; {train} pieces of 12 "
        f"lines to fine-tune on, {EPOCHS} epochs, {valid} of other files to test on.",
        "",
        *markdown_table(header, rows, 1),
        "",
        "One run each, without a choice of rates: a difference of a few points says nothing.",
    ]
    return "\n".join(lines)


def _kept(before: Path, after: Path) -> str:
    """Whether all masks are as they were, and each 2:4 weight has one."""
    first, second = _newest(before), _newest(after)
    names = [key for key in first.keys("sparsity/") if key.endswith("/mask")]
    same = sum(torch.equal(first.read(key), second.read(key)) for key in names)
    return f"{same} of {len(names)} unchanged"


def _newest(run: Path) -> CheckpointReader:
    reader = choose(run / "checkpoints", ControlPlane(None))
    if reader is None:
        raise CheckpointError(f"{run}: holds no checkpoint")
    return reader


if __name__ == "__main__":
    sys.exit(main())
