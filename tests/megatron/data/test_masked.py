"""BERT's samples: what is masked, which segments there are, and that an index decides all of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.data.bert.masked_tokens import masked_tokens
from megasparse.errors import ConfigError, DataError
from megasparse.megatron.data.datasets import SampleStream
from megasparse.megatron.data.masked import UNKNOWN_ORDER, MaskedStream

LENGTH, EOD, SIZE = 64, 95, 100
FLAGS = ["--model-type", "bert", "--data-path", "D", "--vocab-size", str(SIZE)]
FLAGS += ["--seq-length", str(LENGTH)]


class Windows:
    """In place of GPT's samples: counting tokens, an end of a document every 40."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        whole = torch.arange(LENGTH + 1) * 3 % 90 + index % 5
        whole[39::40] = EOD
        return {"tokens": whole[:-1], "labels": whole[1:]}


def stream(*flags: str) -> MaskedStream:
    config = resolve(load_config([*FLAGS, *flags]), 1)
    windows = SampleStream([Windows()], [1.0], config.train.seed)
    return MaskedStream(windows, masked_tokens(config, None), config, EOD)


def window_of(samples: MaskedStream, index: int) -> dict[str, torch.Tensor]:
    return Windows()[samples.locate(index)[1]]


def original(sample: dict[str, torch.Tensor]) -> list[int]:
    """The tokens before they were masked, without padding."""
    counts = sample["loss_mask"].bool()
    tokens = torch.where(counts, sample["labels"], sample["tokens"])
    return tokens[sample["padding_mask"].bool()].tolist()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


CLS, SEP, MASK, PAD = range(96, 100)


def test_masked_tokens_alone():
    samples = stream("--no-bert-binary-head", "--short-seq-prob", "0")
    masked = words = 0
    becomes = {"mask": 0, "other": 0, "same": 0}
    for index in range(200):
        sample, window = samples[index], window_of(samples, index)
        inner = [SEP if t == EOD else int(t) for t in window["tokens"][: LENGTH - 2]]
        assert original(sample) == [CLS, *inner, SEP] and not sample["types"].any()
        assert sample["is_random"] == UNKNOWN_ORDER
        counts = sample["loss_mask"].bool()
        assert not torch.isin(sample["labels"][counts], torch.tensor([CLS, SEP, MASK, PAD])).any()
        assert not sample["labels"][~counts].any()
        masked, words = masked + int(counts.sum()), words + LENGTH
        for seen, label in zip(sample["tokens"][counts], sample["labels"][counts], strict=True):
            kind = "mask" if seen == MASK else "same" if seen == label else "other"
            assert kind != "other" or seen < CLS
            becomes[kind] += 1
    assert masked / words == pytest.approx(0.15, abs=0.01)
    shares = {kind: count / masked for kind, count in becomes.items()}
    assert shares["mask"] == pytest.approx(0.8, abs=0.04)
    assert shares["other"] == pytest.approx(0.1, abs=0.04)


def test_two_segments_of_one_document():
    samples = stream()
    changed, lengths = 0, set()
    for index in range(200):
        sample = samples[index]
        tokens = original(sample)
        lengths.add(len(tokens))
        assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
        border = tokens.index(SEP) + 1
        first, second = tokens[1 : border - 1], tokens[border:-1]
        types = sample["types"][: len(tokens)].tolist()
        assert types == [0] * border + [1] * (len(tokens) - border)
        assert (sample["tokens"][len(tokens) :] == PAD).all()
        assert (
            not sample["loss_mask"][len(tokens) :].any()
            and not sample["types"][len(tokens) :].any()
        )
        piece = [*second, *first] if sample["is_random"] else [*first, *second]
        window = window_of(samples, index)["tokens"][:39].tolist()
        assert piece == window[: len(piece)]
        changed += int(sample["is_random"])
    assert 70 < changed < 130 and len(lengths) > 5 and max(lengths) == 39 + 3


def test_the_index_decides_and_every_epoch_is_masked_anew():
    one, two, other_seed = stream(), stream(), stream("--seed", "5")
    assert all(equal(one[index], two[index]) for index in (0, 3, 1, 9000))
    assert not equal(one[3], other_seed[3])
    again = next(n for n in range(5, 10) if one.locate(n) == one.locate(3))
    assert not torch.equal(one[3]["tokens"], one[again]["tokens"])


def tokenizer(*pieces: str) -> SimpleNamespace:
    return SimpleNamespace(pieces=lambda: list(pieces), pad=None)


def test_tokens_that_a_tokenizer_lacks_come_behind_its_own():
    config = resolve(
        load_config(["--model-type", "bert", "--data-path", "D", "--vocab-size", "99"]), 1
    )
    found = masked_tokens(config, tokenizer("[PAD]", "a", "##b", "[MASK]", "."))
    assert (found.cls, found.sep, found.mask, found.pad) == (5, 6, 3, 0)
    assert found.ordinary == 5 and found.vocab_size == 7
    assert found.continues == (False, False, True, False, False, False, False)
    spaced = masked_tokens(config, tokenizer("\u2581a", "b", "\u0120c", ".", "<0x0A>", "7"))
    assert spaced.continues[:6] == (False, True, False, False, True, True)
    config.bert.sep_token = "."
    assert masked_tokens(config, tokenizer("a", ".")).sep == 1
    config.bert.mask_token = "."
    with pytest.raises(DataError, match="two of its tokens are one"):
        masked_tokens(config, tokenizer("a", "."))
    config.bert.mask_token = "?"
    with pytest.raises(DataError, match="--mask-token '\\?'"):
        masked_tokens(config, tokenizer("a", "."))
    config.bert.mask_token, config.model.vocab_size = None, 4
    with pytest.raises(ConfigError, match="vocab_size 4 with model_type bert, expected at least 5"):
        masked_tokens(config, tokenizer("a", "."))


def test_whole_words_are_masked():
    from megasparse.megatron.data.masked import Masking

    config = resolve(load_config(FLAGS), 1)
    tokens = masked_tokens(config, None)
    continues = tuple(number % 2 == 1 for number in range(SIZE))
    import dataclasses

    import numpy as np

    masking = Masking(dataclasses.replace(tokens, continues=continues), 0.3)
    random = np.random.RandomState(0)
    for _ in range(50):
        _, places, _ = masking.masked([CLS, *range(0, 40), SEP], random)
        inside = {place for place in places if place > 0}
        assert places and all((place + 1 if place % 2 else place - 1) in inside for place in inside)
