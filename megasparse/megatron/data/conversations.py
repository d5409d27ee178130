"""Samples of conversations: several in one, each sees itself only, loss on answers alone.

A sample has `seq_length` places. Conversations lie one after the other, each with positions from 0
on and without its last token, which is only a label; the rest is filled up. What fills up is a
conversation of its own without loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megasparse.data.blend import SPLITS
from megasparse.data.chat.packing import Packing, answer_tokens, pack
from megasparse.data.indexed import read_index
from megasparse.data.mixture import document_bounds
from megasparse.data.sidecar import bin_path, mask_path
from megasparse.log import logger
from megasparse.megatron.blocks.packing import bounds_by_positions
from megasparse.megatron.data.datasets import SampleOptions, SampleStream, Source


class PackedConversations(torch.utils.data.Dataset):
    """The samples of a part of one dataset, by their number.

    Args:
        prefix: of a validated dataset with a mask.
        first, last: its conversations from `first` up to `last`.
        options: of samples; `eod` fills up.

    Attributes:
        packing: numbers are from `first` on.
    """

    def __init__(self, prefix: str, first: int, last: int, options: SampleOptions) -> None:
        index = read_index(prefix)
        self._prefix, self._options, self._dtype = prefix, options, index.dtype
        ends = np.cumsum(index.lengths, dtype=np.int64)
        self._ends, self._lengths = ends[first:last], index.lengths[first:last]
        self._files: tuple[np.ndarray, np.ndarray] | None = None
        answers = np.zeros(0, dtype=np.int64)
        if last > first:
            part = slice(int(self._ends[0] - self._lengths[0]), int(self._ends[-1]))
            mask = np.memmap(mask_path(prefix), dtype=np.uint8, mode="r")[part]
            answers = answer_tokens(mask, self._lengths, options.seq_length)
        self.packing: Packing = pack(self._lengths, answers, options.seq_length)

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        options, length = self._options, self._options.seq_length
        tokens = np.full(length, options.eod, dtype=np.int64)
        labels, positions = tokens.copy(), np.zeros(length, dtype=np.int64)
        mask, owner = np.zeros(length, dtype=np.float32), np.full(length, -1, dtype=np.int64)
        at = 0
        for number in self.packing[sample]:
            ids, answers = self._conversation(int(number))
            part = slice(at, at + len(ids) - 1)
            tokens[part], labels[part], mask[part] = ids[:-1], ids[1:], answers[1:]
            positions[part], owner[part] = np.arange(len(ids) - 1), number
            at = part.stop
        positions[at:] = np.arange(length - at)
        item = {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": torch.from_numpy(positions),
        }
        if options.attention_masks:
            own = torch.from_numpy(owner)
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            item["attention_mask"] = (later | (own[:, None] != own[None]))[None]
        return item

    def _conversation(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, as far as they fit into a sample."""
        if self._files is None:  # mapped by each process for itself
            self._files = (
                np.memmap(bin_path(self._prefix), dtype=self._dtype, mode="r"),
                np.memmap(mask_path(self._prefix), dtype=np.uint8, mode="r"),
            )
        start = int(self._ends[number] - self._lengths[number])
        stop = min(int(self._ends[number]), start + self._options.seq_length + 1)
        ids, mask = (file[start:stop] for file in self._files)
        return ids, mask

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": None}


class ConversationStream(SampleStream):
    """A `SampleStream` of packed conversations."""

    def __init__(
        self,
        datasets: Sequence[PackedConversations],
        weights: Sequence[float],
        options: SampleOptions,
    ) -> None:
        super().__init__(datasets, weights, options.seed)
        self._packings = [dataset.packing for dataset in datasets]
        self._packed = not options.attention_masks

    def bounds(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        return bounds_by_positions(batch["position_ids"]) if self._packed else None

    def loss_tokens(self, first: int, count: int) -> int:
        places = (self.locate(first + i) for i in range(count))
        return sum(int(self._packings[source].answers[sample]) for source, sample in places)


def build_conversations(
    sources: Sequence[Source], split: str, fractions: Sequence[float], options: SampleOptions
) -> ConversationStream | None:
    """The samples of one split; says how they are packed, and what was cut.

    Args:
        sources: validated datasets with masks.
        split, fractions: as of `build_stream`.

    Returns:
        None when the split holds no conversation.
    """
    kept, weights = [], []
    for source in sources:
        count = len(read_index(source.prefix).lengths)
        number, bounds = SPLITS.index(split), document_bounds(count, fractions)
        first, last = int(bounds[number]), int(bounds[number + 1])
        dataset = PackedConversations(source.prefix, first, last, options)
        if not len(dataset):
            continue
        kept.append(dataset)
        weights.append(len(dataset) if source.weight is None else source.weight)
        _tell(source.prefix, split, last - first, dataset.packing, options.seq_length)
    return ConversationStream(kept, weights, options) if kept else None


def _tell(prefix: str, split: str, count: int, packing: Packing, seq_length: int) -> None:
    room = len(packing) * seq_length
    logger.info(
        "%s (%s): %d conversations in %d samples of %d tokens, %.1f%% filled, %.1f%% answers",
        Path(prefix).name,
        split,
        count - packing.num_left_out,
        len(packing),
        seq_length,
        100.0 * packing.places / room,
        100.0 * int(packing.answers.sum()) / room,
    )
    if packing.num_cut:
        logger.warning(
            "%s (%s): %d conversations of %d are longer than --seq-length %d and are cut at their "
            "end, %d of them are left out, as they have no answer then",
            Path(prefix).name,
            split,
            packing.num_cut,
            count,
            seq_length,
            packing.num_left_out,
        )
