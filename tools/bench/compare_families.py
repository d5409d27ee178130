"""Logits of every family of Hugging Face models, there and here, in both directions.

    torchrun --standalone --nproc-per-node 2 -m tools.bench.compare_families --output FILE

A model of random weights, of the family's own class in transformers, is read as `--load-hf` reads
it; then a checkpoint is made of it, exported by its settings alone, and read by transformers. All
in float32 on the CPU, on one tensor-parallel rank and on two. The exit code is 1 if a difference is
larger than 1e-4.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import megasparse
from megasparse.atomic_files import write_text
from megasparse.checkpoint.importer import write_imported
from megasparse.checkpoint.model import StoredModel, open_checkpoint
from megasparse.cli import markdown_table
from megasparse.convert.export import ExportOptions, write_huggingface
from megasparse.convert.huggingface.folder import HuggingFaceModel
from megasparse.convert.source import PartSource
from megasparse.distributed.control_plane import ControlPlane
from megasparse.inference.loading import load_model
from megasparse.megatron.grid import Grid, make_grid
from tools.bench.parts.family_models import (
    FAMILIES,
    TOKENS,
    VERSION,
    VOCAB,
    make_model,
    their_logits,
)

LIMIT = 1e-4
KINDS = ("llama", "llama-tied-scaled", "gpt2", *FAMILIES)
SHARD_BYTES = 10**9


class Compared(NamedTuple):
    """One model: its class, the largest logit, and the largest differences.

    Attributes:
        read: of a Hugging Face folder read here, on one rank and on two.
        written: of a checkpoint, on one rank and on two, exported and read by transformers.
    """

    kind: str
    architecture: str
    largest: float
    read: tuple[float, float]
    written: tuple[float, float]


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="Markdown file of the table (default: printed)")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    if dist.get_world_size() != 2:
        parser.error("expected two ranks: torchrun --nproc-per-node 2")
    root = [tempfile.mkdtemp(prefix="families-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(root)
    try:
        found = compare(Path(root[0]))
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(root[0])
    if dist.get_rank() == 0:
        text = report(found)
        if args.output is not None:
            write_text(args.output, text)
        print(text)
    dist.destroy_process_group()
    return int(any(max(*one.read, *one.written) > LIMIT for one in found))


def compare(root: Path) -> list[Compared]:
    """All models, in folders below `root`, on both ranks; the largest differences of all ranks."""
    folders = [root / str(number) for number in range(len(KINDS))]
    if dist.get_rank() == 0:
        for kind, folder in zip(KINDS, folders, strict=True):
            _make(kind, folder)
    dist.barrier()
    theirs = [[their_logits(folder / name) for name in ("theirs", "back")] for folder in folders]
    differences = torch.zeros(len(KINDS), 2, 2)  # model, direction, layout
    for layout, ranks in enumerate((1, 2)):
        grid = make_grid(ranks, torch.device("cpu"), seed=0)
        for number, folder in enumerate(folders):
            stored = StoredModel(open_checkpoint(folder / "ours", ControlPlane(None)))
            sources: tuple[PartSource, PartSource] = HuggingFaceModel(folder / "theirs"), stored
            for direction, source in enumerate(sources):
                ours = _our_logits(source, grid)
                worst = (ours - theirs[number][direction]).abs().max()
                differences[number, direction, layout] = worst
    names = [_architecture(folder) for folder in folders]
    dist.all_reduce(differences, dist.ReduceOp.MAX)
    dist.barrier()  # then the folders may go
    return [
        Compared(kind, name, float(logits[0].abs().max()), *map(tuple, rows))
        for kind, name, logits, rows in zip(KINDS, names, theirs, differences.tolist(), strict=True)
    ]


def _make(kind: str, folder: Path) -> None:
    """A Hugging Face folder, a checkpoint of it, and a Hugging Face folder of that."""
    model: Any = make_model(kind)
    model.save_pretrained(folder / "theirs")
    source = HuggingFaceModel(folder / "theirs")
    write_imported(source, folder / "ours", SHARD_BYTES, 16, [])
    stored = StoredModel(open_checkpoint(folder / "ours", ControlPlane(None)))
    write_huggingface(stored, folder / "back", ExportOptions(SHARD_BYTES))


def _architecture(folder: Path) -> str:
    """The class that a folder names."""
    config = json.loads((folder / "theirs" / "config.json").read_text("utf-8"))
    return str(config["architectures"][0])


def _our_logits(source: PartSource, grid: Grid) -> torch.Tensor:
    """Of a source on this rank's model, `(B, S, V)`."""
    model, _ = load_model(source, torch.device("cpu"), grid.tp_size, bf16=False, grid=grid)
    tokens = torch.tensor(TOKENS)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, positions, None, runtime_gather_output=True)
    return logits[..., :VOCAB]


def report(found: list[Compared]) -> str:
    """The page."""
    head = ["model", "class", "largest logit"]
    head += [f"{way} Hugging Face, TP {n}" for way in ("from", "to") for n in (1, 2)]
    rows = [
        [
            one.kind,
            f"`{one.architecture}`",
            f"{one.largest:.1f}",
            *(f"{value:.1e}" for value in (*one.read, *one.written)),
        ]
        for one in found
    ]
    worst = max(max(*one.read, *one.written) for one in found)
    command = "torchrun --standalone --nproc-per-node 2 -m tools.bench.compare_families"
    return "\n".join(
        [
            "# Logits of every family, here and in transformers",
            "",
            f"{datetime.date.today()}, CPU ({platform.machine()}), float32, Python "
            f"{platform.python_version()}, torch {torch.__version__}, transformers "
            f"{VERSION}, megasparse {megasparse.__version__}. Made by",
            "",
            f"    {command} {shlex.join(sys.argv[1:])}".rstrip(),
            "",
            f"Largest difference between two logits of {len(TOKENS)} sequences of "
            f"{len(TOKENS[0])} tokens, of random weights, two to four layers,",
            f"windows shorter than the sequences. The largest of all is {worst:.1e}; {LIMIT:.0e} "
            "is allowed.",
            "",
            *markdown_table(head, rows, 2),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
