"""Samples of packed conversations: each sees itself only, and answers alone have a loss."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megasparse.data.indexed_writer import IndexedDatasetWriter, Provenance
from megasparse.data.tokenizers.tokenizer import NullTokenizer
from megasparse.megatron.blocks.packing import bounds_by_positions
from megasparse.megatron.data.batches import _loss_tokens
from megasparse.megatron.data.conversations import build_conversations
from megasparse.megatron.data.datasets import SampleOptions, Source

LENGTH = 16
OPTIONS = SampleOptions(
    LENGTH, seed=3, eod=0, vocab_size=128, reset_attention_mask=True, attention_masks=True
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Conversations of other tokens each, some longer than a sample; ids, masks and the prefix."""
    prefix = str(tmp_path_factory.mktemp("chat") / "c")
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 128, int(n)).astype(np.uint16) for n in rng.integers(4, 24, 30)]
    masks = [np.arange(len(one)) >= len(one) // 2 for one in ids]
    with IndexedDatasetWriter(prefix, np.uint16, masked=True) as writer:
        for one, mask in zip(ids, masks, strict=True):
            writer.add_documents(one, [len(one)], mask)
        writer.finish(Provenance(NullTokenizer(128), False, "test", "template"))
    return prefix, ids, masks


def _stream(dataset, split="train", options=OPTIONS):
    return build_conversations([Source(dataset[0], None, "d")], split, (0.8, 0.2, 0.0), options)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_sample_is_its_conversations_one_after_the_other(dataset, split):
    _, ids, masks = dataset
    stream = pickle.loads(pickle.dumps(_stream(dataset, split)))
    numbers = range(24) if split == "train" else range(24, 30)
    wanted = {
        ids[i][: LENGTH + 1].tobytes(): masks[i][1 : LENGTH + 1]
        for i in numbers
        if masks[i][1 : LENGTH + 1].any()
    }
    for index in range(stream.epoch_length):
        item, counted = stream[index], 0
        starts = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), LENGTH]
        for start, stop in zip(starts, starts[1:]):
            part = slice(start, stop)
            assert torch.equal(item["position_ids"][part], torch.arange(stop - start))
            whole = [*item["tokens"][part].tolist(), int(item["labels"][stop - 1])]
            mask = wanted.pop(np.array(whole, np.uint16).tobytes(), None)
            if mask is None:  # what fills up
                assert stop == LENGTH and set(whole) == {0} and not item["loss_mask"][part].any()
                continue
            assert whole[1:] == item["labels"][part].tolist()
            assert item["loss_mask"][part].tolist() == mask.tolist()
            counted += int(mask.sum())
            seen = ~item["attention_mask"][0, part]
            causal = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            assert torch.equal(seen[:, part], causal)
            assert not seen[:, :start].any() and not seen[:, stop:].any()
        assert stream.loss_tokens(index, 1) == counted == int(item["loss_mask"].sum())
    assert not wanted


def test_packed_sequences_end_where_conversations_end(dataset):
    packs = SampleOptions(LENGTH, 3, 0, 128, reset_attention_mask=True, attention_masks=False)
    stream = _stream(dataset, options=packs)
    batch = torch.utils.data.default_collate([stream[0], stream[1]])
    assert "attention_mask" not in batch
    bounds = stream.bounds(batch).tolist()
    assert bounds[0] == 0 and bounds[-1] == 2 * LENGTH and LENGTH in bounds
    assert bounds == bounds_by_positions(batch["position_ids"]).tolist()
    assert (batch["position_ids"].flatten()[bounds[:-1]] == 0).all()
    assert _stream(dataset).bounds(batch) is None


@pytest.mark.parametrize("dp", [1, 2])
def test_micro_batches_are_divided_by_the_tokens_of_the_step(dataset, dp):
    stream = _stream(dataset)
    train = SimpleNamespace(global_batch_size=4, micro_batch_size=1, rampup_batch_size=None)
    config, grid = SimpleNamespace(train=train), SimpleNamespace(dp_size=dp)
    found = _loss_tokens(stream, config, grid, 8, None)
    of_steps = [[next(found) for _ in range(4 // dp)] for _ in range(2)]
    for step, tokens in enumerate(of_steps):
        assert set(tokens) == {stream.loss_tokens(8 + 4 * step, 4) / 4}
    assert next(_loss_tokens(stream, config, grid, 0, 8)) == stream.loss_tokens(0, 8) / 8


def test_what_is_longer_than_a_sample_is_told(dataset, caplog):
    caplog.set_level("INFO", logger="megasparse")
    _stream(dataset)
    told = [record.getMessage() for record in caplog.records]
    assert "c (train): 24 conversations in" in told[0] and "% answers" in told[0]
    assert "are longer than --seq-length 16 and are cut at their end, 0 of them" in told[1]
