"""Samples of BERT: Megatron's masking on packed tokens, new in every epoch.

megatron-core's BERT dataset keeps one masking of a sample for all epochs, reads WordPiece alone,
pads rightly with token 0 alone, and takes its samples from documents that were cut into sentences.
Here a sample is a window of the stream of tokens that GPT reads, so every `.bin` serves, blends and
cached indices included. Its masking is megatron-core's `_create_masked_lm_predictions`.

- With the head of masked tokens alone it is the whole window, and [SEP] stands where a document
  ends (as in RoBERTa).
- With the order of two segments it is the window's longest piece of one document, cut in two. In
  half of the samples the second part comes first.

What is drawn depends on (seed, global index of the sample) alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset

from megasparse.config import ResolvedConfig
from megasparse.data.bert.masked_tokens import MaskedTokens
from megasparse.megatron.data.datasets import SampleStream

# Names of a batch. Those that GPT's have too mean the same.
TYPES, PADDING_MASK, IS_RANDOM = "types", "padding_mask", "is_random"
UNKNOWN_ORDER = -1  # a sample of one segment; no loss


class Masking(BERTMaskedWordPieceDataset):
    """Megatron's choice of what is masked: whole words, up to three in a row; 80 % become [MASK],
    10 % another token, 10 % stay.

    Args:
        tokens: of the run.
        probability: share of the tokens.
    """

    def __init__(self, tokens: MaskedTokens, probability: float) -> None:  # of no dataset
        names = {
            number: ("##" if continues else "") + str(number)
            for number, continues in enumerate(tokens.continues)
        }
        tokenizer = SimpleNamespace(
            cls=tokens.cls, sep=tokens.sep, mask=tokens.mask, inv_vocab=names
        )
        self.config = SimpleNamespace(
            tokenizer=tokenizer,
            masking_probability=probability,
            masking_max_ngram=3,
            masking_do_full_word=True,
            masking_do_permutation=False,
            masking_use_longer_ngrams=False,
            masking_use_geometric_distribution=False,
        )
        self.token_lookup = [n for n in range(tokens.ordinary) if n not in tokens.special]

    def masked(
        self, tokens: list[int], random: np.random.RandomState
    ) -> tuple[list[int], list[int], list[int]]:
        """Tokens as the model sees them; places that count; what stood there."""
        seen, places, labels, *_ = self._create_masked_lm_predictions(tokens, len(tokens), random)
        return seen, places, labels


class MaskedStream(SampleStream):
    """Samples of BERT by global index, without end, from GPT's.

    A sample is a dict of tokens (with masks), labels (the original tokens), types (the segment, 0
    or 1), padding_mask (1 where there is a token) `(S,)` int64, loss_mask (1 where a token is to be
    predicted) `(S,)` float32, is_random (whether the segments have changed places; -1: there is one
    alone) 0-d int64, and sample_id.

    Args:
        stream: whose windows they are made of.
        eod: the token that ends a document.
    """

    def __init__(
        self, stream: SampleStream, tokens: MaskedTokens, config: ResolvedConfig, eod: int
    ) -> None:
        super().__init__(stream._datasets, stream._weights.tolist(), config.train.seed)
        self._tokens, self._eod = tokens, eod
        self._length = config.model.seq_length
        self._pairs = config.model.bert_binary_head
        self._short = config.bert.short_seq_prob
        self._masking = Masking(tokens, config.bert.mask_prob)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        given = super().__getitem__(index)
        window = np.append(given["tokens"].numpy(), given["labels"][-1])
        key = np.array([self._seed, index], dtype=np.uint64)
        random = np.random.RandomState(np.random.Philox(key=key))
        first, second, order = self._segments(window, random)
        tokens = [self._tokens.cls, *first, self._tokens.sep]
        types = [0] * len(tokens)
        if second:
            tokens += [*second, self._tokens.sep]
            types += [1] * (len(second) + 1)
        seen, places, labels = self._masking.masked(tokens, random)
        target = np.zeros(self._length, np.int64)
        counts = np.zeros(self._length, np.float32)
        target[places], counts[places] = labels, 1.0
        return {
            "tokens": self._padded(seen, self._tokens.pad),
            "labels": torch.from_numpy(target),
            "loss_mask": torch.from_numpy(counts),
            TYPES: self._padded(types, 0),
            PADDING_MASK: self._padded([1] * len(tokens), 0),
            IS_RANDOM: torch.tensor(order),
            "sample_id": given["sample_id"],
        }

    def _segments(
        self, window: np.ndarray, random: np.random.RandomState
    ) -> tuple[list[int], list[int], int]:
        """The tokens of both segments, and whether they have changed places."""
        room = self._length - (3 if self._pairs else 2)
        if random.random_sample() < self._short:
            room = random.randint(2, room + 1)
        if not self._pairs:
            window = np.where(window == self._eod, self._tokens.sep, window)
            return window[:room].tolist(), [], UNKNOWN_ORDER
        ends = np.flatnonzero(window == self._eod)
        bounds = [-1, *ends.tolist(), len(window)]
        pieces = [window[a + 1 : b] for a, b in zip(bounds, bounds[1:], strict=False)]
        piece = max(pieces, key=len)[:room].tolist()
        if len(piece) < 2:
            return piece, [], UNKNOWN_ORDER
        pivot = random.randint(1, len(piece))
        changed = int(random.random_sample() < 0.5)
        first, second = piece[:pivot], piece[pivot:]
        return (second, first, changed) if changed else (first, second, changed)

    def _padded(self, values: list[int], padding: int) -> torch.Tensor:
        whole = np.full(self._length, padding, np.int64)
        whole[: len(values)] = values
        return torch.from_numpy(whole)
