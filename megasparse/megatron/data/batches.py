"""From the configuration to batches: checked files, tokenizer, and the order of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megasparse.config import ResolvedConfig
from megasparse.config.batches import batch_size
from megasparse.data.blend import SPLITS, parse_split
from megasparse.data.check import CheckedData, check_amounts, check_data
from megasparse.data.mixture import describe, samples_wanted, shares
from megasparse.data.tokenizers.tokenizer import Tokenizer
from megasparse.distributed.signals import ignore_signals
from megasparse.log import logger
from megasparse.megatron.blocks.packing import CU_SEQLENS
from megasparse.megatron.context.batch import DIVISOR, own_tokens
from megasparse.megatron.data.classes import ClassSamples
from megasparse.megatron.data.conversations import build_conversations
from megasparse.megatron.data.datasets import (
    SampleOptions,
    SampleStream,
    Source,
    build_mock_stream,
    build_stream,
)
from megasparse.megatron.data.masked import MaskedStream
from megasparse.megatron.grid import Grid
from megasparse.megatron.model import packs_documents

VALID_SET = "valid:"  # before the name of one of several validation sets


@dataclass
class RunData:
    """Everything that the loop reads.

    Attributes:
        tokenizer: None when the run has only token ids (`vocab_size` without a tokenizer).
        vocab_size: tokens before padding.
        streams: samples by split; a split may be missing. "valid:NAME" is one of several
            validation sets.
        digests: of data and tokenizer, to be kept with the run.
        chat_template: of conversations, kept with the run too; None: the data are texts.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    streams: dict[str, SampleStream]
    digests: dict[str, str]
    chat_template: str | None = None


def build_data(config: ResolvedConfig, grid: Grid, checked: CheckedData | None = None) -> RunData:
    """Checked data as sample streams, the same on every rank.

    Args:
        checked: by `check_data`; done here if not given.

    Raises:
        DataError: a damaged file, or a training split smaller than one global batch.
    """
    checked = checked or check_data(config)
    tokenizer, vocab_size = checked.tokenizer, checked.vocab_size
    sources = {
        split: [Source(s.prefix, s.weight, s.digest) for s in group]
        for split, group in checked.sources.items()
    }
    packs = packs_documents(config, grid.device)
    options = SampleOptions(
        seq_length=config.model.seq_length,
        seed=config.train.seed,
        eod=checked.eod,
        vocab_size=vocab_size,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
        eod_mask_loss=config.data.eod_mask_loss,
        attention_masks=not packs,
    )
    streams: dict[str, SampleStream] = {}
    if checked.classes is not None:
        return RunData(tokenizer, vocab_size, _of_classes(checked, config), checked.digests)

    def masked(stream: SampleStream | None) -> SampleStream | None:
        if stream is None or checked.masked is None:
            return stream
        return MaskedStream(stream, checked.masked, config, checked.eod)

    for number, split in enumerate(SPLITS):
        if config.data.mock_data:
            streams[split] = build_mock_stream(options, split)
            continue
        chosen = sources.get("all") or sources.get(split)
        if chosen is None:
            continue
        shares = parse_split(config.data.split) if "all" in sources else _only(number)
        stream = masked(_stream(chosen, split, shares, options, config, grid))
        if stream is not None:
            streams[split] = stream
            _tell_mixture(stream, split, config, checked)
    if config.data.multiple_validation_sets:
        for name, source in named_sets(sources["valid"]).items():
            stream = masked(_stream([source], "valid", _only(1), options, config, grid))
            if stream is not None:
                streams[VALID_SET + name] = stream
    found = streams["train"].epoch_length if "train" in streams else 0
    check_amounts(config, found, "valid" in streams)
    return RunData(tokenizer, vocab_size, streams, checked.digests, checked.chat_template)


def _stream(
    sources: Sequence[Source],
    split: str,
    fractions: Sequence[float],
    options: SampleOptions,
    config: ResolvedConfig,
    grid: Grid,
) -> SampleStream | None:
    if config.data.sft:
        return build_conversations(sources, split, fractions, options)
    return grid.first_rank_first(
        lambda: build_stream(sources, split, fractions, options, config.data.data_cache_path)
    )


def named_sets(sources: Sequence[Source]) -> dict[str, Source]:
    """Validation sets by the names of their files; a name that two have gets its place."""
    names = [Path(source.prefix).name for source in sources]
    return {
        name if names.count(name) == 1 else f"{name}_{place}": source
        for place, (name, source) in enumerate(zip(names, sources, strict=True))
    }


def batches(
    stream: SampleStream,
    config: ResolvedConfig,
    grid: Grid,
    first_sample: int,
    together: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of this rank for ever, from global sample `first_sample` on.

    Micro-batch `m` of a step holds the samples
    `step_start + (m * dp + dp_rank) * micro_batch_size + [0, micro_batch_size)`: a step's samples
    do not depend on the data-parallel size. Of each sample a context parallel rank has its part.

    Args:
        together: samples whose losses are averaged, where the numbers of tokens that count differ;
            None: those of an optimizer step.
    """
    loader = torch.utils.data.DataLoader(
        stream,
        batch_sampler=_MicroBatches(config.train.micro_batch_size, grid, first_sample),
        num_workers=config.data.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=grid.device.type == "cuda",
        # Its own: an iterator draws a seed at its start, and dropout must not notice.
        generator=torch.Generator(),
    )
    stored = iter(loader)
    for tokens in _loss_tokens(stream, config, grid, first_sample, together):
        batch = next(stored)
        if (bounds := stream.bounds(batch)) is not None:
            batch[CU_SEQLENS] = bounds
        if tokens is not None:
            batch[DIVISOR] = torch.tensor(tokens, dtype=torch.float32)
        yield own_tokens(
            {name: tensor.to(grid.device, non_blocking=True) for name, tensor in batch.items()},
            grid,
        )


def _loss_tokens(
    stream: SampleStream, config: ResolvedConfig, grid: Grid, first: int, together: int | None
) -> Iterator[float | None]:
    """For each of this rank's micro-batches what its losses are divided by, so that the
    mean over micro-batches and ranks is the mean over the tokens of all of them."""
    train = config.train
    while True:
        count = together or batch_size(train, first)
        total = stream.loss_tokens(first, count)
        micro_batches = count // train.micro_batch_size
        for _ in range(micro_batches // grid.dp_size):
            yield None if total is None else total / micro_batches
        first += count


def is_lost_worker(error: BaseException) -> bool:
    """Whether torch says by this error that a process of `--num-workers` was killed.

    It notices by SIGCHLD, so the error comes out of whatever the rank does at that moment.
    """
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def samples_digest(stream: SampleStream, first_sample: int, count: int) -> str:
    """A short digest of the ids of `count` samples: equal digests mean equal samples, in order."""
    ids = [stream.locate(first_sample + i) for i in range(count)]
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


class _MicroBatches:
    """Global sample indices of one rank's micro-batches, endless."""

    def __init__(self, size: int, grid: Grid, first_sample: int) -> None:
        self._size, self._grid, self._first = size, grid, first_sample

    def __iter__(self) -> Iterator[list[int]]:
        start = self._first + self._grid.dp_rank * self._size
        while True:
            yield list(range(start, start + self._size))
            start += self._grid.dp_size * self._size


def _of_classes(checked: CheckedData, config: ResolvedConfig) -> dict[str, SampleStream]:
    assert checked.classes is not None and checked.tokenizer is not None and checked.masked
    streams: dict[str, SampleStream] = {}
    for split, texts in checked.classes.splits.items():
        length, seed = config.model.seq_length, config.train.seed
        samples = ClassSamples(texts, checked.tokenizer, checked.masked, length)
        streams[split] = SampleStream([samples], [1.0], seed)
    return streams


def _tell_mixture(
    stream: SampleStream, split: str, config: ResolvedConfig, checked: CheckedData
) -> None:
    """What the run reads of each dataset, for the log."""
    wanted = samples_wanted(split, config)
    kept = [share for share in shares(checked.of_split(split), split, config) if share.samples]
    if wanted:
        for line in describe(kept, stream.samples_of_each(wanted), split):
            logger.info("%s", line)


def _only(number: int) -> tuple[float, ...]:
    return tuple(1.0 if i == number else 0.0 for i in range(len(SPLITS)))
