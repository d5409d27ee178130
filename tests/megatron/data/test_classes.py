"""Samples of texts with classes: where text, marks and padding are, for texts of every length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.megatron.data.classes import LABEL, ClassSamples
from megasparse.megatron.data.masked import PADDING_MASK, TYPES

CLS, SEP, PAD, LENGTH = 100, 101, 102, 8
# By the number of their tokens: none, one, one less than there is room for, as many, and more.
SIZES = [0, 1, 5, 6, 7, 30]


@pytest.fixture
def samples() -> ClassSamples:
    """A tokenizer whose tokens are the letters; the text's number is its label."""
    texts = tuple(bytes(range(1, 1 + size)).decode() for size in SIZES)
    labelled: Any = SimpleNamespace(texts=texts, labels=tuple(range(10, 10 + len(SIZES))))
    tokenizer: Any = SimpleNamespace(encode=lambda text: list(text.encode()))
    tokens: Any = SimpleNamespace(cls=CLS, sep=SEP, pad=PAD)
    return ClassSamples(labelled, tokenizer, tokens, LENGTH)


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_a_sample_is_its_text_between_marks_and_padding_that_is_not_seen(samples, number):
    found = samples[number]
    kept = min(SIZES[number], LENGTH - 2)
    padding = LENGTH - 2 - kept
    assert found["tokens"].tolist() == [CLS, *range(1, 1 + kept), SEP, *[PAD] * padding]
    assert found[PADDING_MASK].tolist() == [1] * (kept + 2) + [0] * padding
    assert found[TYPES].tolist() == [0] * LENGTH
    assert found[LABEL].shape == () and int(found[LABEL]) == 10 + number
    assert {value.dtype for value in found.values()} == {torch.int64}


def test_there_are_as_many_samples_as_texts_and_they_make_a_batch(samples):
    assert len(samples) == len(SIZES)
    batch = torch.utils.data.default_collate([samples[n] for n in range(len(SIZES))])
    assert batch[LABEL].tolist() == [10, 11, 12, 13, 14, 15]
    assert batch["tokens"].shape == batch[PADDING_MASK].shape == (len(SIZES), LENGTH)
    assert batch[PADDING_MASK].sum(1).tolist() == [2, 3, 7, 8, 8, 8]
