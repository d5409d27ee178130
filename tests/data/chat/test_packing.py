"""Packing: every conversation once, nothing too long, and the counts of a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasparse.data.chat.packing import answer_tokens, pack


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(2, 24),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_every_conversation_with_an_answer_is_in_one_sample(lengths, seq_length, seed):
    mask = np.random.default_rng(seed).integers(0, 2, sum(lengths)).astype(np.uint8)
    parts = np.split(mask, np.cumsum(lengths)[:-1])
    expected = [int(part[1 : seq_length + 1].sum()) for part in parts]
    answers = answer_tokens(mask, np.array(lengths, np.int32), seq_length)
    assert answers.tolist() == expected
    packing = pack(np.array(lengths, np.int32), answers, seq_length)
    found = [packing[i].tolist() for i in range(len(packing))]
    kept = [i for i, count in enumerate(expected) if count]
    assert sorted(i for sample in found for i in sample) == kept
    taken = [sum(min(lengths[i] - 1, seq_length) for i in sample) for sample in found]
    assert all(0 < places <= seq_length for places in taken) and packing.places == sum(taken)
    assert packing.answers.tolist() == [sum(expected[i] for i in sample) for sample in found]
    # Best fit leaves no two samples that are both half empty.
    assert sum(2 * places < seq_length for places in taken) <= 1
    long = [i for i, length in enumerate(lengths) if length > seq_length + 1]
    assert packing.num_cut == len(long)
    assert packing.num_left_out == sum(not expected[i] for i in long)


def test_the_fullest_sample_with_room_is_taken():
    lengths, ones = np.array([9, 7, 4, 3, 2]), np.ones(5, np.int64)
    packing = pack(lengths, ones, 10)  # 8, 6, 3, 2, 1 places
    assert [packing[i].tolist() for i in range(len(packing))] == [[0, 3], [1, 2, 4]]


@pytest.mark.parametrize("count", [0, 3])
def test_no_conversation_with_an_answer_makes_no_sample(count):
    packing = pack(np.full(count, 5, np.int32), np.zeros(count, np.int64), 8)
    assert len(packing) == packing.places == 0
