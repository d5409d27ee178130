"""A resume reads its own share, from few files, and puts back every bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import dist
from tests.parallel.layouts import CP2, PP2, TP2, zero
from tests.runs import TINY

LAYOUTS = {
    "zero 0": ["--zero-stage", "0"],
    "zero 1, tp 2": [*TP2, *zero(1)],
    "zero 1, pp 2": [*PP2, *zero(1)],
    "zero 1, cp 2": [*CP2, *zero(1)],
    "zero 3": zero(3),
}
WORLD = 4
# Of the run that was saved in one layout: another one that resumes it.
CHANGES = {
    "zero 0": "zero 1, tp 2",
    "zero 1, tp 2": "zero 3",
    "zero 1, pp 2": "zero 0",
    "zero 1, cp 2": "zero 3",
    "zero 3": "zero 1, pp 2",
}


def _saved_and_resumed(rank: int, world: int, run: list[str], data: str) -> dict[str, Any]:
    """Steps, a save, and a resume in each layout: what it opened and read, and what differs."""
    import os

    import torch

    from megasparse.checkpoint.pieces import Piece
    from megasparse.checkpoint.reader import CheckpointReader
    from megasparse.config import load_config, resolve
    from megasparse.distributed.control_plane import make_control_plane
    from megasparse.distributed.events import Events
    from megasparse.distributed.signals import StopRequest
    from megasparse.megatron.data.batches import batches, build_data
    from megasparse.megatron.grid import make_grid
    from megasparse.train import checkpoint
    from megasparse.train.build import build_engine
    from megasparse.train.engine.deepspeed import start_process
    from megasparse.train.loop import RunServices, Trainer

    device = start_process(2.0)
    services = RunServices(make_control_plane(), StopRequest(), Events())

    def trainer(flags: list[str]) -> Trainer:
        config = resolve(load_config(flags), world)
        parallel = config.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        grid = make_grid(
            tp,
            device,
            config.train.seed,
            pipeline_model_parallel_size=pp,
            context_parallel_size=parallel.context_parallel_size,
        )
        return Trainer(config, grid, build_data(config, grid), services)

    def state(of: Trainer) -> dict[str, torch.Tensor]:
        tensors = checkpoint.collect(of.engine).items()
        return {key: value.detach().clone() for key, (_, value) in tensors}

    def folder_of(run: Trainer) -> Path:
        return Path(run.config.checkpoint.save) / "step-00000002"

    def part_of(stored: CheckpointReader, piece: Piece) -> torch.Tensor:
        if piece.key not in stored:  # without ZeRO a parameter is its own master
            assert piece.key.endswith("/master")
            piece = dataclasses.replace(piece, key=f"param/{piece.key.split('/')[1]}")
        return stored.read_part(piece)

    def resumed(flags: list[str], name: str) -> tuple[Trainer, dict[str, Any]]:
        """The run that goes on; files that it opened and bytes that it read."""
        opened: list[str] = []
        read: list[int] = []
        verified: list[int] = []
        real_open, real_read = os.open, os.preadv

        def note_open(path, *more, **named):
            if str(path).endswith(".safetensors"):
                opened.append(Path(path).name)
            return real_open(path, *more, **named)

        def note_read(descriptor, buffers, at):
            read.append(real_read(descriptor, buffers, at))
            return read[-1]

        def note_built(*a, **named):
            verified.append(sum(read))
            return build_engine(*a, **named)

        with (
            mock.patch("megasparse.tensor_files.os.open", note_open),
            mock.patch("megasparse.tensor_files.os.preadv", note_read),
            mock.patch("megasparse.train.loop.build_engine", note_built),
        ):
            second = trainer([*flags, "--resume"])
        return second, {
            "opened": opened,
            "verified": verified[0],
            "loaded": sum(read) - verified[0],
            "total": sum(path.stat().st_size for path in folder_of(second).glob("*.safetensors")),
            "step": second.controller.clock.step,
        }

    found: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        flags = [*run, *layout, "--data-path", data, "--run-dir", f"{run[-1]}-{name}"]
        first = trainer(flags)
        stream = batches(first.data.streams["train"], first.config, first.grid, 0)
        for _ in range(2):
            first.engine.train_step(stream)
        first._save()
        first.saver.finish()
        before = state(first)
        second, cost = resumed(flags, name)
        after = state(second)
        differs = [k for k in before if not torch.equal(before[k], after[k])]
        found[name] = cost | {"differs": differs + sorted(before.keys() ^ after.keys())}

        other = [*run, *LAYOUTS[CHANGES[name]], *flags[len(run) + len(layout) :]]
        second, cost = resumed(other, name)
        stored = CheckpointReader(folder_of(second), verify=False)
        differs = [
            key
            for key, (piece, value) in checkpoint.collect(second.engine).items()
            if not key.startswith("rng/") and not key.endswith("/flips")
            if not torch.equal(part_of(stored, piece), value.detach().reshape(-1))
        ]
        found[f"{name} -> {CHANGES[name]}"] = cost | {"differs": differs}
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, dataset) -> list[dict[str, Any]]:
    run = [*TINY, "--sparsity-recipe", "fst", "--global-batch-size", "8", "--run-dir"]
    return dist.run(
        _saved_and_resumed, WORLD, [*run, str(tmp_path_factory.mktemp("resume") / "run")], dataset
    )


CASES = [*LAYOUTS, *(f"{before} -> {after}" for before, after in CHANGES.items())]


@pytest.mark.parametrize("layout", CASES)
def test_every_bit_comes_back(resumed, layout):
    for rank, found in enumerate(resumed):
        assert found[layout]["step"] == 2
        assert found[layout]["differs"] == [], rank


@pytest.mark.parametrize("layout", CASES)
def test_a_rank_reads_its_share_and_no_more(resumed, layout):
    """Of the bytes of the checkpoint, in any layout; every file is verified by one rank before."""
    results = [found[layout] for found in resumed]
    total = results[0]["total"]
    assert sum(result["verified"] for result in results) == pytest.approx(total, rel=0.02)
    for result in results:
        assert result["loaded"] <= 1.5 * total / WORLD, results
    assert sum(len(result["opened"]) for result in results) <= 2 * WORLD, results
