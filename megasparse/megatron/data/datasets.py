"""megatron-core's GPT dataset behind a sample order that depends on (seed, global index) alone.

megatron-core packs documents into samples of `seq_length + 1` tokens. It is asked for one epoch of
every source; what comes after is decided here, so that sample `i` of a run never depends on how
long the run is: sources are interleaved by weight (Megatron's greedy rule, whose prefix does not
depend on its length), and each source is gone through in a fresh permutation every epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
    MockGPTLowLevelDataset,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megasparse.data.blend import SPLITS
from megasparse.data.mixture import document_bounds
from megasparse.errors import DataError
from megasparse.log import is_logging_rank
from megasparse.megatron.blocks.packing import cumulative_lengths
from megasparse.megatron.data.index_cache import VerifiedGPTDataset
from megasparse.progress import progress

# Up to here samples of a blend are counted one by one.
_EXACT_COUNT = 1 << 20


@dataclass(frozen=True)
class Source:
    """One dataset of a blend.

    Attributes:
        prefix: path without `.bin` / `.idx`.
        weight: share of the samples; None: by its number of samples.
        digest: of its index file; keeps caches of different contents apart.
    """

    prefix: str
    weight: float | None
    digest: str


@dataclass(frozen=True)
class SampleOptions:
    """How documents become samples (Megatron's meanings).

    Attributes:
        attention_masks: documents are kept apart by masks; False: by packed sequences.
    """

    seq_length: int
    seed: int
    eod: int
    vocab_size: int
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    attention_masks: bool = True

    @property
    def packed_by(self) -> int | None:
        """The token between packed documents; None where they are not packed."""
        return self.eod if self.reset_attention_mask and not self.attention_masks else None


class _MegatronTokenizer:
    """The little that megatron-core's datasets ask of a tokenizer."""

    def __init__(self, options: SampleOptions, mock: bool) -> None:
        self.eod = options.eod
        # With a size given, megatron-core would derive the token type from it instead of the file.
        self.vocab_size = options.vocab_size if mock else None
        self.unique_identifiers = {"eod": options.eod}


class Samples(Protocol):
    """Samples of one dataset by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]: ...


class SampleStream(torch.utils.data.Dataset):
    """Samples by global index, without end: `stream[i]` is defined for every `i >= 0`.

    A sample is a dict of tokens, labels, position_ids `(S,)` int64, loss_mask `(S,)` float32 and,
    when documents must not see each other, attention_mask `(1, S, S)` bool (True: forbidden);
    `sample_id` `(2,)` int64 names source and sample.

    Attributes:
        packed_by: the token that ends a document, where they are kept apart by packed sequences.
    """

    def __init__(
        self,
        datasets: Sequence[Samples],
        weights: Sequence[float],
        seed: int,
        packed_by: int | None = None,
    ) -> None:
        self.packed_by = packed_by
        self._datasets = list(datasets)
        self._weights = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._seed = seed
        self._blend: tuple[np.ndarray, np.ndarray] | None = None
        self._permutation = functools.lru_cache(maxsize=4)(self._permute)

    def bounds(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Where the documents of a micro-batch begin and end, for packed sequences; None: they are
        not packed. See `blocks.packing`."""
        if self.packed_by is None:
            return None
        return cumulative_lengths(batch["tokens"], self.packed_by)

    def loss_tokens(self, first: int, count: int) -> int | None:
        """Tokens that have a loss in `count` samples from `first` on; None: each micro-batch counts
        its own."""
        return None

    @property
    def epoch_length(self) -> int:
        """Different samples that the sources hold together."""
        return sum(len(dataset) for dataset in self._datasets)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, sample within it) of a global index."""
        source, count = self._interleave(index)
        epoch, position = divmod(count, len(self._datasets[source]))
        return source, int(self._permutation(source, epoch)[position])

    def samples_of_each(self, count: int) -> list[int]:
        """How many of the first `count` samples come from each source."""
        if len(self._datasets) == 1:
            return [count]
        if count > _EXACT_COUNT:  # the greedy rule keeps every source within a sample of this
            return [round(count * weight) for weight in self._weights]
        self._interleave(count - 1)
        assert self._blend is not None
        return np.bincount(self._blend[0][:count], minlength=len(self._datasets)).tolist()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        source, sample = self.locate(index)
        item = dict(self._datasets[source][sample])
        item["sample_id"] = torch.tensor([source, sample])
        return item

    def _interleave(self, index: int) -> tuple[int, int]:
        """Which source the index falls to, and how many samples of it came before."""
        if len(self._datasets) == 1:
            return 0, index
        if self._blend is None or index >= len(self._blend[0]):
            size = max(4096, 2 * (index + 1))
            chosen, counts = np.zeros(size, np.int16), np.zeros(size, np.int64)
            helpers.build_blending_indices(
                chosen, counts, self._weights, len(self._datasets), size, False
            )
            self._blend = (chosen, counts)
        return int(self._blend[0][index]), int(self._blend[1][index])

    def _permute(self, source: int, epoch: int) -> np.ndarray:
        key = np.array([self._seed, source << 32 | epoch], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        return generator.permutation(len(self._datasets[source]))

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: the cache of permutations stays behind."""
        state = self.__dict__.copy()
        del state["_permutation"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._permutation = functools.lru_cache(maxsize=4)(self._permute)


def build_stream(
    sources: Sequence[Source],
    split: str,
    fractions: Sequence[float],
    options: SampleOptions,
    cache_dir: str | None,
) -> SampleStream | None:
    """The samples of one split.

    Args:
        sources: validated datasets (`megasparse.data.indexed.validate`).
        split: train, valid or test.
        fractions: shares of the documents for the three splits, summing to 1.
        options: packing.
        cache_dir: where megatron-core keeps its indices; default: `cache` beside the data. Rank 0
            must call first.

    Returns:
        None when the split holds no whole sample.
    """
    shown = progress(
        sources, desc=f"indexing {split}", unit="dataset", enabled=is_logging_rank(), leave=False
    )
    datasets = [_build(source, split, fractions, options, cache_dir) for source in shown]
    kept = [(s, d) for s, d in zip(sources, datasets, strict=True) if d is not None and len(d) > 0]
    if not kept:
        return None
    weights = [len(d) if s.weight is None else s.weight for s, d in kept]
    return SampleStream([d for _, d in kept], weights, options.seed, options.packed_by)


def build_mock_stream(options: SampleOptions, split: str) -> SampleStream:
    """Generated counting sequences (Megatron's `--mock-data`)."""
    config = _dataset_config(options, None, None, None, mock=True)
    low_level = MockGPTLowLevelDataset(config.tokenizer)
    indices = np.arange(1000, dtype=np.int32) + 1000 * SPLITS.index(split)
    dataset = MockGPTDataset(low_level, None, indices, None, Split[split], config)
    return SampleStream([dataset], [1.0], options.seed, options.packed_by)


def _build(
    source: Source,
    split: str,
    fractions: Sequence[float],
    options: SampleOptions,
    cache_dir: str | None,
) -> GPTDataset | None:
    low_level = IndexedDataset(source.prefix, multimodal=False, mmap=True)
    bounds = document_bounds(len(low_level), fractions)
    number = SPLITS.index(split)
    indices = np.arange(bounds[number], bounds[number + 1], dtype=np.int32)
    lengths = low_level.sequence_lengths[indices]
    if int(lengths.sum()) <= options.seq_length:
        return None
    folder = Path(cache_dir) if cache_dir else Path(source.prefix).parent / "cache"
    shares = ",".join(repr(float(fraction)) for fraction in fractions)
    config = _dataset_config(
        options, source.prefix, shares, str(folder / source.digest[:16]), mock=False
    )
    try:
        return VerifiedGPTDataset(low_level, source.prefix, indices, None, Split[split], config)
    except OSError as error:
        raise DataError(f"{folder}: sample indices cannot be kept here: {error}") from error


def _dataset_config(
    options: SampleOptions, prefix: str | None, split: str | None, cache: str | None, mock: bool
) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=options.seed,
        sequence_length=options.seq_length,
        blend=None if prefix is None else ([prefix], None),
        split=split if split is not None else "1,1,1",
        path_to_cache=cache,
        tokenizer=_MegatronTokenizer(options, mock),
        reset_position_ids=options.reset_position_ids,
        reset_attention_mask=options.reset_attention_mask,
        eod_mask_loss=options.eod_mask_loss,
        create_attention_mask=options.reset_attention_mask and options.attention_masks,
    )
