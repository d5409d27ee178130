"""A trained model in one process, to be measured and changed layer by layer.

Reads a checkpoint of any layout, computes in float32 on the CPU or one GPU, and writes checkpoints
that evaluations, exports and `--finetune` read.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasparse.checkpoint.model import ADAPTER, PROJECTION, StoredModel
from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import Saver, choose
from megasparse.config import (
    ParallelConfig,
    ResolvedConfig,
    RunConfig,
    SparsityConfig,
    fill_defaults,
    from_dict,
    to_dict,
)
from megasparse.convert.source import require_decoder
from megasparse.distributed.control_plane import ControlPlane
from megasparse.distributed.rendezvous import join_group, own_device
from megasparse.errors import CheckpointError, ConfigError, DataError
from megasparse.kernels.patterns import encode_patterns
from megasparse.megatron.calibrate import LinearInputs, calibrate_layers
from megasparse.megatron.data.batches import batches, build_data, samples_digest
from megasparse.megatron.grid import collective_timeout, make_grid
from megasparse.megatron.loss import masked_sum, token_cross_entropy
from megasparse.megatron.model import build_model, hide_padding
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.slorb import fold


@dataclass(frozen=True)
class LowRank:
    """SLoRB's matrices of one linear: S `(N, R)` and P `(R, K)`, None for sums over groups."""

    adapter: torch.Tensor
    projection: torch.Tensor | None

    def fold_into(self, effective: torch.Tensor) -> torch.Tensor:
        """One dense matrix for both."""
        return fold(effective, self.adapter, self.projection)


class StoredRun:
    """The newest intact checkpoint of a folder: weights as the GEMMs use them, whole.

    Args:
        folder: of a run's checkpoints.

    Raises:
        CheckpointError: none is intact.
    """

    def __init__(self, folder: Path) -> None:
        reader = choose(folder, ControlPlane(None))
        if reader is None:
            raise CheckpointError(f"{folder}: holds no checkpoint")
        self.reader: CheckpointReader = reader
        self.config: RunConfig = from_dict(reader.meta["config"], str(reader.folder))
        stored = StoredModel(reader, fold=False)
        require_decoder(stored.model, stored.where, "pruning and quantizing are of decoders")
        self.model = stored.model
        names = [key.removeprefix("param/") for key in reader.keys("param/")]
        self.names = [name for name in names if not name.endswith((ADAPTER, PROJECTION))]
        # The vocabulary with its padding, as the model has it.
        self.weights = {
            name: (
                stored.read(name) if name in stored.sparse else reader.read(f"param/{name}")
            ).float()
            for name in self.names
        }
        sparse = {key.split("/")[1] for key in reader.keys("sparsity/")}
        self.sparse = [name for name in self.names if name in sparse]
        self.low_rank = {}
        for name in sorted(stored.boosted):
            adapter, projection = stored.low_rank(name)
            whole = None if projection is None else projection.float()
            self.low_rank[name] = LowRank(adapter.float(), whole)

    def folded(self) -> dict[str, torch.Tensor]:
        """All weights with the low-rank branches folded in."""
        return {
            name: self.low_rank[name].fold_into(weight) if name in self.low_rank else weight
            for name, weight in self.weights.items()
        }


class OfflineModel:
    """The dense model of a stored run, in this process.

    Args:
        run: gives sizes, data and the vocabulary; its weights are not put in.
        data_path: other data than the run's, as in `--data-path`.
        micro_batch_size: of calibration and evaluation; default the run's.
        seed: of the order of samples, so that runs can be measured on the same; default the run's.
    """

    def __init__(
        self,
        run: StoredRun,
        data_path: list[str] | None = None,
        micro_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not dist.is_initialized():
            device = own_device()
            join_group(device, collective_timeout(10.0))
        self.config = _own_config(run.config, data_path, micro_batch_size, seed)
        if self.config.model.num_experts is not None:
            raise ConfigError(
                f"num_experts {self.config.model.num_experts}: experts are not pruned or quantized "
                "after training, expected a model without"
            )
        self.grid = make_grid(1, device, self.config.train.seed)
        data = build_data(self.config, self.grid)
        self._streams = data.streams
        rows = run.weights["embedding.word_embeddings.weight"].shape[0]
        self.model = build_model(self.config, self.grid, rows)
        hide_padding(self.model, self.grid, data.vocab_size)
        self.model.eval().requires_grad_(False)

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over whole weights by name; all of them.

        Raises:
            CheckpointError: one is missing or has another shape.
        """
        for name, parameter in self.model.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                found = tuple(weights[name].shape) if name in weights else "nothing"
                raise CheckpointError(f"{name}: found {found}, expected {tuple(parameter.shape)}")
            parameter.copy_(weights[name])

    def take(self) -> dict[str, torch.Tensor]:
        """A copy of the weights by name, on the CPU."""
        return {n: p.detach().cpu().clone() for n, p in self.model.named_parameters()}

    def micro_batches(self, split: str, count: int) -> Iterator[dict[str, torch.Tensor]]:
        """The first `count` of a split, the same at every call.

        Raises:
            DataError: the data has no such split.
        """
        if split not in self._streams:
            raise DataError(f"the data holds no {split} split")
        stream = batches(self._streams[split], self.config, self.grid, 0)
        for _, batch in zip(range(count), stream, strict=False):
            yield batch

    def samples(self, count: int, split: str = "valid") -> str:
        """A digest of what `micro_batches` gives: equal ones mean equal samples, in order."""
        samples = count * self.config.train.micro_batch_size
        return samples_digest(self._streams[split], 0, samples)

    @torch.no_grad()
    def loss(self, count: int, split: str = "valid") -> float:
        """Mean cross entropy over the tokens of `count` micro-batches."""
        total, tokens = 0.0, 0.0
        for batch in self.micro_batches(split, count):
            logits = self.model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"))
            losses = token_cross_entropy(logits, batch["labels"]).double()
            here, counted = masked_sum(losses, batch["loss_mask"])
            total += float(here)
            tokens += float(counted)
        return total / max(tokens, 1.0)

    def calibrate(
        self,
        count: int,
        change: Callable[[str, torch.nn.Module, dict[str, LinearInputs]], None],
        gram: bool = True,
    ) -> None:
        """Change the layers one after the other, each with inputs of the changed ones before it.

        Args:
            count: micro-batches of the training split.
            change: given a layer's name, module, and what its linears have seen, by the name within
                the layer.
            gram: collect Gram matrices too.
        """
        calibrate_layers(self.model, self.micro_batches("train", count), change, gram)


def save_pruned(
    run: StoredRun,
    folder: Path,
    weights: dict[str, torch.Tensor],
    masks: dict[str, torch.Tensor],
    origin: dict[str, Any],
) -> Path:
    """Write a 2:4 model as a checkpoint of the recipe `ste` at the step of its source.

    Args:
        weights: all parameters, whole.
        masks: bool `(N, K)` of the pruned ones.
        origin: what was done, JSON; kept in the manifest's state.
    """
    config = dataclasses.replace(
        run.config,
        parallel=ParallelConfig(zero_stage=0),
        sparsity=SparsityConfig(
            sparsity_recipe="ste",
            sparse_layers=sorted(name.removesuffix(".weight") for name in masks),
        ),
    )
    tensors: dict[str, tuple[Piece, torch.Tensor]] = {}

    def add(key: str, value: torch.Tensor) -> None:
        tensors[key] = (Piece(key, WeightShard(tuple(value.shape))), value.contiguous())

    for name, value in weights.items():
        add(f"param/{name}", value.to(run.reader.read(f"param/{name}").dtype))
    for name, mask in masks.items():
        add(f"sparsity/{name}/mask", encode_patterns(mask, transposable=False))
        add(f"sparsity/{name}/counters", torch.tensor([run.reader.meta["step"], 1]))
    kept = ("consumed_samples", "digests", "versions")
    meta = {
        **{key: run.reader.meta[key] for key in kept},
        "layout": {"world": 1, "tp": 1, "dp": 1, "pp": 1, "zero": 0},
        "optimizer_steps": 0,
        "config": to_dict(config),
        "state": {**run.reader.meta["state"], "origin": origin},
    }
    step = run.reader.meta["step"]
    Saver(folder, ControlPlane(None), secrets.token_hex(8)).save(step, tensors, meta, final=True)
    return folder


def _own_config(
    config: RunConfig, data_path: list[str] | None, micro_batch_size: int | None, seed: int | None
) -> ResolvedConfig:
    """One process in float32, dense, without dropout."""
    micro_batch_size = micro_batch_size or config.train.micro_batch_size
    data = config.data
    if data_path:
        data = dataclasses.replace(
            data, data_path=data_path, train_data_path=[], valid_data_path=[], test_data_path=[]
        )
    own = dataclasses.replace(
        config,
        parallel=ParallelConfig(zero_stage=0),
        model=dataclasses.replace(config.model, hidden_dropout=0.0, attention_dropout=0.0),
        train=dataclasses.replace(
            config.train,
            bf16=False,
            micro_batch_size=micro_batch_size,
            global_batch_size=micro_batch_size,
            seed=config.train.seed if seed is None else seed,
        ),
        data=data,
    )
    return fill_defaults(own, 1)
