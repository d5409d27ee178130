"""What each dataset of a blend can give: its samples by split, and whether that is its share.

megatron-core drops a dataset that holds no whole sample, and its blend goes on without it: half of
a mixture vanishes without a word. Here a dataset that cannot give what was asked of it is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megasparse.config import DataConfig, ResolvedConfig
from megasparse.config.batches import samples_after
from megasparse.data.blend import SPLITS, parse_split
from megasparse.data.chat.packing import pack
from megasparse.errors import DataError
from megasparse.log import logger

_WORDS = {"train": "training", "valid": "validation", "test": "testing"}


@dataclass(frozen=True)
class Source:
    """A dataset as it was checked.

    Attributes:
        prefix: path without `.bin`.
        weight: as given in the blend; None: as many as it holds.
        digest: of its files.
        lengths: int32 (documents,) tokens of each.
        eod: token that ends a document, by its sidecar.
        tokens: digests of the `.bin`, by kind: "sampled", "sha256" where all bytes were read.
        answers: int64 (documents,), of conversations: tokens that have a loss, of those that fit
            into a sample; None: documents are texts.
        template: chat template of the conversations.
    """

    prefix: str
    weight: float | None
    digest: str
    lengths: np.ndarray
    eod: int | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    answers: np.ndarray | None = None
    template: str | None = None


@dataclass(frozen=True)
class Share:
    """A dataset's part in one split.

    Attributes:
        prefix: of the dataset.
        fraction: of the split's samples that is asked of it.
        documents, tokens: that fall into the split.
        samples: different whole ones in them.
    """

    prefix: str
    fraction: float
    documents: int
    tokens: int
    samples: int


def document_bounds(count: int, fractions: Sequence[float]) -> np.ndarray:
    """int64 (splits + 1,): where the splits of `count` documents begin and end."""
    return np.round(np.cumsum([0.0, *fractions]) * count).astype(np.int64)


def shares(sources: Sequence[Source], split: str, config: ResolvedConfig) -> list[Share]:
    """The parts of all datasets in a split.

    Args:
        sources: of the blend that the split comes from.
        split: train, valid or test.
        config: gives the length of a sample, and `--split` where one blend is divided by it.
    """
    found = []
    for source in sources:
        chosen = slice(None)
        if config.data.data_path:
            bounds = document_bounds(len(source.lengths), parse_split(config.data.split))
            number = SPLITS.index(split)
            chosen = slice(bounds[number], bounds[number + 1])
        lengths = source.lengths[chosen]
        tokens = int(lengths.sum(dtype=np.int64))
        if source.answers is not None:
            samples = len(pack(lengths, source.answers[chosen], config.model.seq_length))
        else:  # the last token is only a label
            samples = max(tokens - 1, 0) // config.model.seq_length
        found.append(Share(source.prefix, 0.0, len(lengths), tokens, samples))
    weights = [
        float(share.samples) if source.weight is None else source.weight
        for share, source in zip(found, sources, strict=True)
    ]
    total = sum(weights) or 1.0
    return [
        Share(s.prefix, weight / total, s.documents, s.tokens, s.samples)
        for s, weight in zip(found, weights, strict=True)
    ]


def check_shares(found: Sequence[Share], split: str, config: ResolvedConfig) -> None:
    """Refuse a dataset that cannot give its share of a split that somebody asked for.

    The default `--split` asks for training and, with `--eval-iters`, validation: what is missing
    of the rest is a warning.

    Args:
        found: by `shares`.

    Raises:
        DataError: names the dataset, what it holds, and what can be done.
    """
    if config.data.data_path and not parse_split(config.data.split)[SPLITS.index(split)]:
        return
    for share in found:
        reason = _cannot_give(share, found, split, config)
        if reason is None:
            continue
        if _is_asked(split, config):
            raise DataError(reason)
        logger.warning("%s", reason)


def _cannot_give(
    share: Share, found: Sequence[Share], split: str, config: ResolvedConfig
) -> str | None:
    length, words = config.model.seq_length, _WORDS[split]
    if not share.samples:
        flag = "another --split" if config.data.data_path else f"another --{split}-data-path"
        return (
            f"{share.prefix} holds {share.tokens} tokens in {share.documents} documents for "
            f"{words}, expected at least one sample of {length} tokens and a label; give more of "
            f"it, {flag}, a smaller --seq-length, or leave it out"
        )
    wanted = max(samples_wanted(split, config), sum(other.samples for other in found))
    if share.fraction * wanted < 0.5:
        return (
            f"{share.prefix}: its share of the {words} data is {share.fraction:.3g}, which rounds "
            f"to none of {wanted} samples; raise its weight, or leave it out"
        )
    return None


def _is_asked(split: str, config: ResolvedConfig) -> bool:
    if split == "train" or (split == "valid" and config.logging.eval_iters):
        return True
    return not config.data.data_path or config.data.split != DataConfig().split


def samples_wanted(split: str, config: ResolvedConfig) -> int:
    """Samples that the run reads of a split: all steps, or one validation."""
    if split == "train":
        return samples_after(config.train, config.train.train_iters)
    return config.train.global_batch_size * (config.logging.eval_iters if split == "valid" else 0)


def describe(found: Sequence[Share], given: Sequence[int], split: str) -> list[str]:
    """The lines of the log: the mixture as it was asked for and as it is given.

    Args:
        found: by `shares`, those of the stream.
        given: samples that the run reads of each.
    """
    total = sum(given)
    lines = [f"{_WORDS[split]} data: {total:,} samples"]
    for share, count in zip(found, given, strict=True):
        lines.append(
            f"  {share.prefix}: asked {share.fraction:.2%}, given {count / max(total, 1):.2%}: "
            f"{count:,} samples, {count / share.samples:.2f} epochs of {share.samples:,}"
        )
    return lines


def tell_repeated(sources: dict[str, list[Source]]) -> None:
    """Warn of the same tokens under two names, or in two splits."""
    seen: dict[str, str] = {}
    for split, group in sources.items():
        for source in group:
            where = f"{source.prefix} ({split})" if split != "all" else source.prefix
            if source.digest in seen:
                logger.warning(
                    "%s and %s seem to hold the same tokens (equal digests)",
                    seen[source.digest],
                    where,
                )
            seen[source.digest] = where
