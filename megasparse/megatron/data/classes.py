"""Samples of texts with classes: [CLS], as much of the text as there is room for, [SEP]."""

from __future__ import annotations

import numpy as np
import torch

from megasparse.data.bert.labelled import LabelledTexts
from megasparse.data.bert.masked_tokens import MaskedTokens
from megasparse.data.tokenizers.tokenizer import Tokenizer
from megasparse.megatron.data.masked import PADDING_MASK, TYPES

LABEL = "label"


class ClassSamples(torch.utils.data.Dataset):
    """The texts of a split; a sample is a dict of tokens, types (0) and padding_mask `(S,)` and the
    label 0-d, all int64.

    Args:
        length: S, tokens of a sample with padding.
    """

    def __init__(
        self, texts: LabelledTexts, tokenizer: Tokenizer, tokens: MaskedTokens, length: int
    ) -> None:
        self._texts, self._tokenizer, self._tokens, self._length = texts, tokenizer, tokens, length

    def __len__(self) -> int:
        return len(self._texts.texts)

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        text = self._tokenizer.encode(self._texts.texts[sample])[: self._length - 2]
        ids = [self._tokens.cls, *text, self._tokens.sep]
        tokens = np.full(self._length, self._tokens.pad, np.int64)
        seen = np.zeros(self._length, np.int64)
        tokens[: len(ids)], seen[: len(ids)] = ids, 1
        return {
            "tokens": torch.from_numpy(tokens),
            TYPES: torch.zeros(self._length, dtype=torch.int64),
            PADDING_MASK: torch.from_numpy(seen),
            LABEL: torch.tensor(self._texts.labels[sample]),
        }
