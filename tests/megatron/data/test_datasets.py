"""The order of samples: a function of (seed, index) alone, complete in every epoch."""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megasparse.megatron.data.datasets import SampleOptions, Source, build_mock_stream, build_stream
from tests.runs import TINY, VOCAB, make_dataset

OPTIONS = SampleOptions(seq_length=16, seed=3, eod=0, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [make_dataset(folder / name, 30, seed) for seed, name in enumerate("ab")]


def _stream(prefixes, options=OPTIONS, weights=(None, None), fractions=(0.8, 0.2, 0.0)):
    sources = [Source(p, w, f"digest{i}") for i, (p, w) in enumerate(zip(prefixes, weights))]
    return build_stream(sources, "train", fractions, options, None)


def test_samples_are_the_text_shifted_by_one(prefixes):
    stream = _stream(prefixes[:1])
    item = stream[0]
    assert item["tokens"].shape == item["labels"].shape == (16,)
    assert torch.equal(item["tokens"][1:], item["labels"][:-1])
    assert torch.equal(item["position_ids"], torch.arange(16))
    assert item["loss_mask"].sum() == 16 and "attention_mask" not in item


def test_every_epoch_is_a_new_permutation_of_all_samples(prefixes):
    stream = _stream(prefixes[:1])
    length = stream.epoch_length
    epochs = [[stream.locate(e * length + i) for i in range(length)] for e in range(3)]
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Counter(epochs[0]) == Counter((0, i) for i in range(length))


def test_order_depends_on_seed_and_index_alone(prefixes):
    forward, backward = _stream(prefixes), _stream(prefixes)
    indices = list(range(200))
    first = [forward.locate(i) for i in indices]
    assert [backward.locate(i) for i in reversed(indices)][::-1] == first
    assert [pickle.loads(pickle.dumps(forward)).locate(i) for i in indices] == first
    other = _stream(prefixes, SampleOptions(seq_length=16, seed=4, eod=0, vocab_size=VOCAB))
    assert [other.locate(i) for i in indices] != first


def test_blend_follows_the_weights(prefixes):
    stream = _stream(prefixes, weights=(0.7, 0.3))
    counts = Counter(stream.locate(i)[0] for i in range(10_000))
    assert abs(counts[0] - 7000) <= 1
    assert stream.samples_of_each(10_000) == [counts[0], counts[1]]
    assert stream.samples_of_each(1 << 40) == [round(0.7 * 2**40), round(0.3 * 2**40)]
    proportional = _stream(prefixes)
    sizes = [len(d) for d in proportional._datasets]
    counts = Counter(proportional.locate(i)[0] for i in range(sum(sizes)))
    assert abs(counts[0] - sizes[0]) <= 1


def test_splits_share_no_document(prefixes):
    streams = {
        split: build_stream([Source(prefixes[0], None, "d")], split, (0.5, 0.5, 0.0), OPTIONS, None)
        for split in ("train", "valid", "test")
    }
    assert streams["test"] is None
    documents = [
        set(streams[split]._datasets[0].document_index.tolist()) for split in ("train", "valid")
    ]
    assert documents[0] and documents[1] and not documents[0] & documents[1]


def test_masks_at_document_ends(prefixes):
    options = SampleOptions(
        seq_length=64,
        seed=3,
        eod=0,
        vocab_size=VOCAB,
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )
    stream = _stream(prefixes[:1], options)
    item = next(stream[i] for i in range(50) if (stream[i]["tokens"][:-1] == 0).any())
    assert (
        item["attention_mask"].shape == (1, 64, 64) and item["attention_mask"].dtype == torch.bool
    )
    ends = (item["tokens"] == 0).nonzero().flatten()
    assert (item["loss_mask"][ends] == 0).all()
    end = int(ends[0])
    if end + 1 < 64:
        assert item["position_ids"][end + 1] == 0 and item["attention_mask"][0, end + 1, end]


def test_too_short_a_split_is_none(prefixes):
    long = SampleOptions(seq_length=10**6, seed=0, eod=0, vocab_size=VOCAB)
    assert _stream(prefixes[:1], long) is None


def test_mock_data_needs_no_files():
    stream = build_mock_stream(OPTIONS, "train")
    assert stream[5]["tokens"].shape == (16,) and int(stream[5]["tokens"].max()) < VOCAB
    assert np.array_equal(stream[5]["tokens"], build_mock_stream(OPTIONS, "train")[5]["tokens"])


def _of_tokens(folder, count, digest="digest"):
    from megasparse.data.indexed_writer import IndexedDatasetWriter

    with IndexedDatasetWriter(folder / f"{count}", np.uint16) as writer:
        writer.add_document(np.arange(1, 1 + count, dtype=np.uint16))
        writer.finish()
    source = Source(str(folder / f"{count}"), None, digest)
    return build_stream([source], "train", (1.0, 0.0, 0.0), OPTIONS, None)


def test_a_sample_takes_its_length_and_one_token_more(tmp_path):
    assert _of_tokens(tmp_path, 16) is None
    stream = _of_tokens(tmp_path, 17)
    assert stream.epoch_length == 1
    assert stream[0]["tokens"].tolist() == list(range(1, 17))
    assert stream[0]["labels"].tolist() == list(range(2, 18))


def test_sources_of_a_blend_are_not_permuted_alike(prefixes):
    stream = _stream([prefixes[0]] * 2)
    orders = {0: [], 1: []}
    for index in range(stream.epoch_length):
        source, sample = stream.locate(index)
        orders[source].append(sample)
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_indices_are_kept_by_the_content_of_the_data(tmp_path):
    """Another text under the same name must not find the indices of the one before."""
    for digest in ("a" * 64, "b" * 64):
        _of_tokens(tmp_path, 40, digest)
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(kept) == 2 and kept == {"a" * 16, "b" * 16}


@pytest.mark.parametrize("batch", [4, 1 << 20])
def test_data_that_is_built_is_at_least_a_batch(batch):
    """Also where no file says before how much there is."""
    from megasparse.config import load_config, resolve
    from megasparse.errors import DataError
    from megasparse.megatron.data.batches import build_data

    flags = ["--mock-data", "--global-batch-size", str(batch), "--train-iters", "3"]
    config = resolve(load_config([*TINY, *flags]), 1)
    grid = SimpleNamespace(device=torch.device("cpu"), first_rank_first=lambda build: build())
    if batch == 4:
        assert {"train", "valid"} <= build_data(config, grid).streams.keys()
        return
    with pytest.raises(DataError, match=f"expected at least one global batch of {batch}"):
        build_data(config, grid)
