"""From samples to a rank's micro-batches: which samples, and what their losses are divided by."""

from __future__ import annotations

import dataclasses
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.megatron.data import batches as module
from megasparse.megatron.data.batches import batches, is_lost_worker, named_sets, samples_digest
from megasparse.megatron.data.datasets import SampleStream, Source
from tests.runs import TINY


class Counted:
    """Samples that are their own numbers."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([sample, sample])}


class Stream(SampleStream):
    """In order; of each sample 10 tokens have a loss."""

    counts = False

    def locate(self, index: int) -> tuple[int, int]:
        return 0, index

    def loss_tokens(self, first: int, count: int) -> int | None:
        return 10 * count + first if self.counts else None


def _stream(packed_by=None) -> Stream:
    return Stream([Counted()], [1.0], 0, packed_by)


def _grid(dp_rank=0, dp_size=1) -> Any:
    cpu = torch.device("cpu")
    return SimpleNamespace(dp_rank=dp_rank, dp_size=dp_size, device=cpu, cp_size=1)


def _config(*flags: str) -> Any:
    return resolve(load_config([*TINY, "--mock-data", "--num-workers", "0", *flags]), 1)


def _samples(count, dp_rank=0, dp_size=1, first=0, **more) -> list[list[int]]:
    found = batches(_stream(), _config(), _grid(dp_rank, dp_size), first, **more)
    return [batch["tokens"][:, 0].tolist() for batch in islice(found, count)]


@pytest.mark.parametrize("first", [0, 12])
def test_a_step_has_the_same_samples_whatever_the_ranks(first):
    alone = sum(_samples(8, first=first), [])
    assert alone == list(range(first, first + 16))
    ranks = [_samples(4, rank, 2, first) for rank in range(2)]
    assert all(len(batch) == 2 for rank in ranks for batch in rank)
    assert sum((a + b for a, b in zip(*ranks, strict=True)), []) == alone


def test_batches_draw_no_number_of_the_run():
    state = torch.get_rng_state()
    next(batches(_stream(), _config(), _grid(), 0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("dp_size", "together"), [(1, None), (2, None), (1, 8), (2, 8)])
def test_losses_are_divided_by_the_mean_of_what_is_averaged_together(dp_size, together):
    """Of 4 samples a step, or of 8, two a micro-batch; their tokens differ from step to step."""
    stream = _stream()
    stream.counts = True
    found = batches(stream, _config(), _grid(0, dp_size), 4, together)
    of_each = [float(batch["divisor"]) for batch in islice(found, 8)]
    count = together or 4
    each = count // 2 // dp_size  # micro-batches of this rank
    firsts = [4 + count * (number // each) for number in range(8)]
    assert of_each == [(10 * count + first) / (count // 2) for first in firsts]
    assert "divisor" not in next(batches(_stream(), _config(), _grid(), 0))


def test_a_batch_grows_with_its_ramp():
    stream = _stream()
    stream.counts = True
    config = _config("--global-batch-size", "8", "--rampup-batch-size", "4", "4", "16")
    divisors = [float(b["divisor"]) for b in islice(batches(stream, config, _grid(), 0), 12)]
    sizes = [4] * 4 + [8] * 2  # steps
    expected, first = [], 0
    for size in sizes:
        expected += [(10 * size + first) / (size // 2)] * (size // 2)
        first += size
    assert divisors == expected[:12]


def test_bounds_of_documents_come_with_a_packed_batch():
    packed = next(batches(_stream(packed_by=1), _config(), _grid(), 0))
    assert module.CU_SEQLENS in packed
    assert module.CU_SEQLENS not in next(batches(_stream(), _config(), _grid(), 0))


def test_a_digest_names_samples_in_order():
    stream = _stream()
    assert samples_digest(stream, 3, 4) == samples_digest(_stream(), 3, 4)
    others = {samples_digest(stream, first, count) for first, count in ((3, 4), (3, 5), (4, 4))}
    assert len(others) == 3 and len(samples_digest(stream, 0, 2)) == 16


def test_validation_sets_are_named_apart():
    sources = [
        Source(f"/{folder}/{name}", None, "d")
        for folder, name in (("a", "x"), ("b", "y"), ("c", "x"))
    ]
    assert named_sets(sources) == {"x_0": sources[0], "y": sources[1], "x_2": sources[2]}


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), True),
        (RuntimeError("another"), False),
        (ValueError("DataLoader worker"), False),
    ],
)
def test_only_torchs_own_words_tell_of_a_lost_worker(error, lost):
    assert is_lost_worker(error) == lost


def _built(monkeypatch, sources, found=None, **data: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """The data of a run whose sources are given, and what streams were asked for."""
    asked: list[tuple[Any, ...]] = []

    def build(group, split, fractions, options, cache):
        asked.append(([source.prefix for source in group], split, tuple(fractions), cache))
        return _stream() if found is None or split in found else None

    config = _config()
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, mock_data=False, **data)
    )
    source = lambda prefix: SimpleNamespace(prefix=prefix, weight=1.0, digest="d")  # noqa: E731
    checked: Any = SimpleNamespace(
        tokenizer=None,
        vocab_size=99,
        eod=0,
        digests={"a": "b"},
        classes=None,
        masked=None,
        sources={split: [source(p) for p in group] for split, group in sources.items()},
        chat_template="template",
    )
    monkeypatch.setattr(module, "build_stream", build)
    monkeypatch.setattr(module, "packs_documents", lambda *_: False)
    monkeypatch.setattr(module, "_tell_mixture", lambda *_: None)
    grid = SimpleNamespace(device=torch.device("cpu"), first_rank_first=lambda build: build())
    return module.build_data(config, grid, checked), asked


def test_one_blend_is_split_and_own_data_are_taken_whole(monkeypatch):
    data, asked = _built(monkeypatch, {"all": ["p"]}, data_cache_path="c")
    shares = (0.9, 0.1, 0.0)
    assert [one[:2] for one in asked] == [(["p"], s) for s in ("train", "valid", "test")]
    assert all(one[2] == pytest.approx(shares) and one[3] == "c" for one in asked)
    assert list(data.streams) == ["train", "valid", "test"]
    assert (data.vocab_size, data.digests, data.chat_template) == (99, {"a": "b"}, "template")
    data, asked = _built(monkeypatch, {"train": ["p"], "valid": ["q", "r"]}, found=["train"])
    assert [one[:3] for one in asked] == [
        (["p"], "train", (1.0, 0.0, 0.0)),
        (["q", "r"], "valid", (0.0, 1.0, 0.0)),
    ]
    assert list(data.streams) == ["train"]


def test_validation_sets_are_read_together_and_each_by_itself(monkeypatch):
    sources = {"train": ["t"], "valid": ["/a/x", "/b/y"]}
    data, asked = _built(monkeypatch, sources, multiple_validation_sets=True)
    assert list(data.streams) == ["train", "valid", "valid:x", "valid:y"]
    assert [one[:3] for one in asked[2:]] == [
        ([prefix], "valid", (0.0, 1.0, 0.0)) for prefix in ("/a/x", "/b/y")
    ]
