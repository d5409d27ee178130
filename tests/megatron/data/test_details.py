"""Details of samples: the order by its definition, kept indices, what fills up, what is drawn."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megasparse.data.indexed_writer import IndexedDatasetWriter, Provenance
from megasparse.data.tokenizers.tokenizer import NullTokenizer
from megasparse.megatron.data import index_cache
from megasparse.megatron.data import masked as masked_module
from megasparse.megatron.data.conversations import build_conversations
from megasparse.megatron.data.datasets import SampleOptions, SampleStream, Source
from megasparse.megatron.data.masked import UNKNOWN_ORDER, Masking


class Numbers:
    """Samples that are their own numbers."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([sample])}


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_is_the_permutation_of_its_key(source, epoch):
    """Same seed, same order, in every version."""
    stream = SampleStream([Numbers(9), Numbers(11)], [1.0, 1.0], seed=5)
    generator = np.random.Generator(
        np.random.Philox(key=np.array([5, source << 32 | epoch], dtype=np.uint64))
    )
    expected = generator.permutation(9 if source == 0 else 11)
    assert stream._permutation(source, epoch).tolist() == expected.tolist()


def test_a_sample_says_where_it_is_from_and_each_source_has_its_epochs():
    stream = SampleStream([Numbers(3), Numbers(100)], [3.0, 1.0], seed=5)
    assert stream.epoch_length == 103 and stream.packed_by is None
    assert stream.bounds({}) is None and stream.loss_tokens(0, 4) is None
    assert stream.samples_of_each(8) == [6, 2]
    seen: dict[int, list[int]] = {0: [], 1: []}
    for index in range(8):
        item = stream[index]
        source, sample = item["sample_id"].tolist()
        assert int(item["tokens"]) == sample and stream.locate(index) == (source, sample)
        seen[source].append(sample)
    assert sorted(seen[0][:3]) == sorted(seen[0][3:]) == [0, 1, 2]
    alone = SampleStream([Numbers(3)], [9.0], seed=5)
    assert alone.samples_of_each(8) == [8]
    assert sorted(alone.locate(n)[1] for n in range(3, 6)) == [0, 1, 2]


def test_documents_are_packed_where_they_are_apart_without_masks():
    def packed_by(**how: bool) -> int | None:
        return SampleOptions(8, 0, 7, 100, **how).packed_by

    assert packed_by() is None and packed_by(reset_attention_mask=True) is None
    assert packed_by(attention_masks=False) is None
    assert packed_by(reset_attention_mask=True, attention_masks=False) == 7


INDICES: Any = (
    np.arange(5, dtype=np.int32),
    np.arange(6).reshape(3, 2),
    np.arange(4, dtype=np.uint32),
)


def test_indices_that_were_kept_are_read_as_they_were(tmp_path):
    assert index_cache._load(tmp_path, "stem") is None
    index_cache._store(tmp_path, "stem", INDICES)
    found = index_cache._load(tmp_path, "stem")
    assert found is not None
    for one, other in zip(found, INDICES, strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)
        assert isinstance(one, np.memmap)  # no memory for a large corpus


@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index"])
@pytest.mark.parametrize("damage", ["flip", "link", "missing", "floats", "cube", "listing"])
def test_indices_that_are_not_as_written_are_made_anew(tmp_path, caplog, name, damage):
    indices: list[Any] = list(INDICES)
    number = index_cache._NAMES.index(name)
    if damage == "floats":
        indices[number] = indices[number].astype(np.float64)
    elif damage == "cube":
        indices[number] = np.zeros((1, 1, 1), dtype=np.int64)
    index_cache._store(tmp_path, "stem", tuple(indices))  # type: ignore[arg-type]
    path, listing = tmp_path / f"stem-{name}.npy", tmp_path / "stem.json"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "link":
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
    elif damage == "missing":
        path.unlink()
    elif damage == "listing":
        digests = json.loads(listing.read_text())
        del digests[path.name]
        listing.write_text(json.dumps(digests))
    with caplog.at_level("WARNING"):
        assert index_cache._load(tmp_path, "stem") is None
    assert "built anew" in caplog.text


def test_masking_is_megatrons_of_whole_words_in_short_runs():
    tokens: Any = SimpleNamespace(
        cls=5, sep=6, mask=7, pad=8, ordinary=5, special={3}, continues=(False, True, False)
    )
    masking = Masking(tokens, 0.25)
    assert masking.token_lookup == [0, 1, 2, 4]
    how = dict(vars(masking.config))
    tokenizer = how.pop("tokenizer")
    assert tokenizer.inv_vocab == {0: "0", 1: "##1", 2: "2"}
    assert (tokenizer.cls, tokenizer.sep, tokenizer.mask) == (5, 6, 7)
    assert how == {
        "masking_probability": 0.25,
        "masking_max_ngram": 3,
        "masking_do_full_word": True,
        "masking_do_permutation": False,
        "masking_use_longer_ngrams": False,
        "masking_use_geometric_distribution": False,
    }


class Draws:
    """Numbers that are given; what they were asked for is kept."""

    def __init__(self, *samples: float, randint: int = 2) -> None:
        self._samples, self._randint = list(samples), randint
        self.asked: list[tuple[int, int]] = []

    def random_sample(self) -> float:
        return self._samples.pop(0)

    def randint(self, low: int, high: int) -> int:
        self.asked.append((low, high))
        return self._randint


def _segments(pairs: bool, window: list[int], draws: Draws) -> Any:
    stream: Any = SimpleNamespace(
        _length=10, _pairs=pairs, _short=0.25, _eod=0, _tokens=SimpleNamespace(sep=99)
    )
    return masked_module.MaskedStream._segments(stream, np.array(window), draws)  # type: ignore


WINDOW = [1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(("drawn", "short"), [(0.2, True), (0.25, False)])
def test_a_short_sample_has_two_tokens_at_least(drawn, short):
    draws = Draws(drawn)
    first, second, order = _segments(False, WINDOW, draws)
    assert draws.asked == ([(2, 9)] if short else [])  # of 8, without [CLS] and [SEP]
    assert first == [1, 2, 99, 3, 4, 5, 6, 7][: 2 if short else 8]
    assert (second, order) == ([], UNKNOWN_ORDER)


@pytest.mark.parametrize(("drawn", "changed"), [(0.4, 1), (0.5, 0), (0.6, 0)])
def test_two_segments_are_of_the_longest_document_and_change_places_in_half(drawn, changed):
    draws = Draws(0.9, drawn)
    parts = ([3, 4], [5, 6, 7, 8, 9])
    first, second, order = _segments(True, WINDOW, draws)
    assert draws.asked == [(1, 7)] and order == changed  # neither of them is empty
    assert (first, second) == (parts[::-1] if changed else parts)


@pytest.mark.parametrize(
    ("window", "first"), [([0, 7, 0, 0], [7]), ([0, 0], []), ([7, 0, 8, 9], None)]
)
def test_a_document_of_one_token_is_no_pair(window, first):
    found = _segments(True, window, Draws(0.9, 0.9, randint=1))
    if first is None:
        assert found == ([8], [9], 0)
    else:
        assert found == (first, [], UNKNOWN_ORDER)


LENGTH = 7  # one conversation each, and three places that fill up


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> list[str]:
    """Two datasets of conversations of five tokens, of which three are answers."""
    prefixes = []
    for name, count in (("a", 3), ("b", 6)):
        prefix = str(tmp_path_factory.mktemp("chats") / name)
        with IndexedDatasetWriter(prefix, np.uint16, masked=True) as writer:
            for number in range(count):
                ids = np.arange(1, 6, dtype=np.uint16) + 10 * number
                writer.add_documents(ids, [5], np.array([0, 0, 1, 1, 1], dtype=bool))
            writer.finish(Provenance(NullTokenizer(128), False, "test", "template"))
        prefixes.append(prefix)
    return prefixes


def _chats(prefixes: list[str], weights: list[float | None], fractions=(1.0, 0.0, 0.0)) -> Any:
    options = SampleOptions(LENGTH, 3, 0, 128, reset_attention_mask=True)
    sources = [Source(p, w, "d") for p, w in zip(prefixes, weights, strict=True)]
    return build_conversations(sources, "train", fractions, options)


def test_what_fills_up_is_seen_by_nobody_and_sees_nobody(chats):
    stream = _chats(chats[1:], [None])
    filled = 0
    for index in range(stream.epoch_length):
        item = stream[index]
        empty = item["tokens"] == 0
        filled += int(empty.sum() == 3)
        mask = item["attention_mask"][0]
        assert mask[empty][:, ~empty].all() and mask[~empty][:, empty].all()
        assert torch.equal(
            mask[empty][:, empty],
            torch.ones(LENGTH, LENGTH).triu(1).bool()[: int(empty.sum()), : int(empty.sum())],
        )
    assert filled == stream.epoch_length == 6


@pytest.mark.parametrize("weights", [(None, None), (3.0, 1.0)])
def test_conversations_of_two_sources_are_mixed_by_weight_or_by_size(chats, weights):
    stream = _chats(chats, list(weights))
    sizes = [len(dataset) for dataset in stream._datasets]
    expected = [w if w is not None else size for w, size in zip(weights, sizes, strict=True)]
    assert stream.samples_of_each(4 * sum(sizes)) == pytest.approx(
        [4 * sum(sizes) * e / sum(expected) for e in expected], abs=1
    )
    assert _chats(chats[:1], [None], (0.0, 1.0, 0.0)) is None
