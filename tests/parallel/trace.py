"""A run that writes down, step by step, what must not depend on the layout."""

from __future__ import annotations

import hashlib
from typing import Any
from unittest import mock


def traced(rank: int, world: int, flags: list[str]) -> list[dict[str, Any]]:
    """Run to the end on this rank (inside `tests.dist.run`).

    Returns:
        A row a step, the same on all ranks: loss, grad_norm, samples (ids in the order in which
        micro-batches take them), masks (a digest of every whole mask), flip_rate, density,
        preparations (the sets of all ranks), scales, valid_loss.
    """
    from megasparse.config import load_config, resolve
    from megasparse.megatron.data import batches
    from megasparse.train import loop, main

    consumed: list[list[tuple[int, ...]]] = []
    rows: list[dict[str, Any]] = []

    def recording(stream, config, grid, first_sample):
        training = first_sample or stream is trainer_streams["train"]
        for batch in batches.batches(stream, config, grid, first_sample):
            if training:
                consumed.append([tuple(i) for i in batch["sample_id"].tolist()])
            yield batch

    trainer_streams: dict[str, Any] = {}

    class Trainer(loop.Trainer):
        def __init__(self, config, grid, run_data, context):
            trainer_streams.update(run_data.streams)
            super().__init__(config, grid, run_data, context)

        def _step(self, stream):
            consumed.clear()
            row = super()._step(stream)
            rows.append({**row, **_across_ranks(self, list(consumed), row["preparations"])})
            return row

    with mock.patch.object(loop, "batches", recording), mock.patch.object(main, "Trainer", Trainer):
        main.pretrain(resolve(load_config(flags), world))
    return rows


def _across_ranks(
    trainer: Any, consumed: list[list[tuple[int, ...]]], preparations: int
) -> dict[str, Any]:
    import torch.distributed as dist

    grid, controller = trainer.grid, trainer.controller
    mine = {
        "place": (grid.dp_rank, grid.pp_rank, grid.tp_rank, grid.cp_rank),
        "consumed": consumed,
        "masks": {s.name: (s.shard, s.mask) for s, _ in controller.weights if s.mask is not None},
        "scales": {s.name: float(s.scale) for s, _ in controller.weights if s.scale is not None},
        "preparations": preparations,
    }
    ranks: list[Any] = [mine] * grid.world
    if grid.world > 1:
        dist.all_gather_object(ranks, mine)
    first = sorted((r for r in ranks if r["place"][1:] == (0, 0, 0)), key=lambda r: r["place"])
    by_micro_batch = zip(*(r["consumed"] for r in first), strict=True)
    readers = [r for r in ranks if r["place"][1] in (0, grid.pp_size - 1)]
    assert all(r["consumed"] == first[r["place"][0]]["consumed"] for r in readers)
    return {
        "samples": [sample for group in by_micro_batch for batch in group for sample in batch],
        "masks": _digests(ranks),
        "scales": {name: scale for r in ranks for name, scale in r["scales"].items()},
        "preparations": {r["preparations"] for r in ranks},
    }


def _digests(ranks: list[dict[str, Any]]) -> dict[str, str]:
    """SHA-256 of every whole mask, put together from shards; replicas (of data and context
    parallelism) must agree."""
    import torch

    wholes: dict[str, Any] = {}
    for replica in sorted({r["place"][::3] for r in ranks}):
        found: dict[str, torch.Tensor] = {}
        for r in ranks:
            if r["place"][::3] != replica:
                continue
            for name, (shard, mask) in r["masks"].items():
                whole = found.setdefault(name, torch.zeros(shard.global_shape, dtype=torch.bool))
                shard.write_into(whole, mask)
        digests = {
            name: hashlib.sha256(whole.numpy().tobytes()).hexdigest()
            for name, whole in sorted(found.items())
        }
        assert wholes in ({}, digests), "replicas have different masks"
        wholes = digests
    return wholes
