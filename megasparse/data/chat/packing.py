"""Which conversations share a sample: best fit, the longest first.

A conversation of n tokens takes n - 1 places: its last token is only a label. One of more places
than a sample has is cut at its end; a conversation that has no answer then is left out. The packing
is a function of the lengths alone, the same on every rank and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Samples of conversations.

    Attributes:
        conversations: int64 (kept,): their numbers, sample after sample.
        bounds: int64 (samples + 1,): where each sample begins in them.
        answers: int64 (samples,): tokens that have a loss.
        places: places that are taken in all samples together.
        num_cut, num_left_out: conversations that are longer than a sample, and those of them that
            have no answer then.
    """

    conversations: np.ndarray
    bounds: np.ndarray
    answers: np.ndarray
    places: int
    num_cut: int
    num_left_out: int

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, sample: int) -> np.ndarray:
        return self.conversations[self.bounds[sample] : self.bounds[sample + 1]]


def answer_tokens(mask: np.ndarray, lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """int64 (conversations,): labels that have a loss, of those that fit into a sample.

    Args:
        mask: uint8 (T,), 1 for tokens of answers.
        lengths: (conversations,) tokens of each, all positive, adding up to T.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    found = np.add.reduceat(mask, starts, dtype=np.int64)
    found -= mask[starts]  # the first token is no label
    for long in np.flatnonzero(lengths > seq_length + 1):
        found[long] = mask[starts[long] + 1 : starts[long] + 1 + seq_length].sum(dtype=np.int64)
    return found


def pack(lengths: np.ndarray, answers: np.ndarray, seq_length: int) -> Packing:
    """The packing of conversations.

    Args:
        lengths: (conversations,) tokens of each.
        answers: of `answer_tokens`, of the same.
        seq_length: places of a sample.
    """
    places = np.minimum(lengths.astype(np.int64) - 1, seq_length)
    kept = np.flatnonzero(answers > 0)
    order = kept[np.argsort(-places[kept], kind="stable")]
    samples: list[list[int]] = []
    for number, sample in zip(order.tolist(), _best_fit(places[order].tolist(), seq_length)):
        if sample == len(samples):
            samples.append([])
        samples[sample].append(number)
    conversations = np.array([n for sample in samples for n in sample], dtype=np.int64)
    bounds = np.cumsum([0, *(len(sample) for sample in samples)], dtype=np.int64)
    counts = np.add.reduceat(answers[conversations], bounds[:-1]) if samples else answers[:0]
    cut = lengths > seq_length + 1
    return Packing(
        conversations,
        bounds,
        counts.astype(np.int64),
        int(places[conversations].sum()),
        int(cut.sum()),
        int((cut & (answers == 0)).sum()),
    )


def _best_fit(sizes: list[int], capacity: int) -> Iterator[int]:
    """For each size the sample that it goes to: the fullest with room for it, else a new one."""
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # samples by the places left
    there, count = 0, 0  # bit n: a sample has n places left
    for size in sizes:
        fitting = there >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            sample = room[left].pop()
            there ^= (not room[left]) << left
        else:
            left, sample = capacity, count
            count += 1
        left -= size
        room[left].append(sample)
        there |= 1 << left
        yield sample
