"""What every source does: it pads the vocabulary, gives parts, and refuses odd weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasparse.convert import source as source_module
from megasparse.convert.source import (
    check_shape,
    pad_vocabulary,
    part_of_whole,
    require_decoder,
    require_finite,
)
from megasparse.errors import CheckpointError, ConfigError
from megasparse.sparsity.shard import WeightShard

WORDS = "embedding.word_embeddings.weight"


def test_the_vocabulary_alone_is_padded_with_zeros():
    tensor = torch.ones(3, 2)
    padded = pad_vocabulary(WORDS, tensor, 5)
    assert padded.shape == (5, 2) and torch.equal(padded[:3], tensor) and not padded[3:].any()
    assert pad_vocabulary(WORDS, tensor, 3) is tensor
    assert pad_vocabulary("decoder.w", tensor, 5) is tensor


def test_a_part_is_that_of_the_padded_whole():
    values = {WORDS: torch.arange(6.0).view(3, 2), "w": torch.arange(8.0).view(4, 2)}
    source = SimpleNamespace(read=values.__getitem__, where="memory")
    found = part_of_whole(source, WORDS, WeightShard((4, 2), 0, 1, 2))
    assert found.tolist() == [[4.0, 5.0], [0.0, 0.0]]
    assert part_of_whole(source, "w", WeightShard((4, 2), 1, 1, 2)).tolist() == [[1], [3], [5], [7]]
    with pytest.raises(CheckpointError, match=r"memory: w has shape \(4, 2\), the model expects"):
        part_of_whole(source, "w", WeightShard((6, 2)))


def test_a_shape_that_differs_is_told_with_the_flag_that_may_mend_it():
    check_shape([4, 2], WeightShard((4, 2), 0, 0, 2), "w", "here")
    for name, hint in (("w", False), (WORDS, True)):
        with pytest.raises(CheckpointError) as error:
            check_shape((4, 3), WeightShard((4, 2)), name, "here")
        assert ("--make-vocab-size-divisible-by" in str(error.value)) == hint


def test_every_value_that_is_not_finite_counts(monkeypatch):
    monkeypatch.setattr(source_module, "_CHUNK", 4)
    tensor = torch.zeros(3, 3)
    require_finite(tensor, "w")
    tensor[0, 0], tensor[1, 2], tensor[2, 2] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(CheckpointError, match="w: found 3 values that are NaN or infinite of 9"):
        require_finite(tensor, "w")
    one = torch.zeros(2)
    one[1] = torch.nan
    with pytest.raises(CheckpointError, match="found 1 values"):
        require_finite(one, "w")


def test_a_bert_is_no_decoder():
    require_decoder(SimpleNamespace(is_bert=False), "here", "what")
    with pytest.raises(ConfigError, match="here: model_type is bert, what: expected gpt"):
        require_decoder(SimpleNamespace(is_bert=True), "here", "what")
