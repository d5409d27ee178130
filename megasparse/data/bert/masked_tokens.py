"""The tokens of BERT that no text has: what begins a sample, ends a segment, masks and pads.

A tokenizer that has them by name is taken at its word. What it lacks is added behind its
vocabulary, as Megatron does, which then has that many tokens more. Without a tokenizer they are the
last four of `--vocab-size`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config import ResolvedConfig
from megasparse.data.tokenizers.tokenizer import Tokenizer
from megasparse.errors import ConfigError, DataError

# How byte-level tokenizers write a space, a line's end, a tab and a carriage return: as letters.
_SPACES = "\u0120\u010a\u0109\u010d"
_KINDS = ("cls", "sep", "mask", "pad")


@dataclass(frozen=True)
class MaskedTokens:
    """Ids of BERT's tokens, and where words begin.

    Attributes:
        cls, sep, mask, pad: of the tokens.
        ordinary: ids below it are the tokenizer's.
        vocab_size: tokens, those included that were added.
        continues: by id, whether the token goes on with the word of the token before it.
    """

    cls: int
    sep: int
    mask: int
    pad: int
    ordinary: int
    vocab_size: int
    continues: tuple[bool, ...]

    @property
    def special(self) -> frozenset[int]:
        """Those that no text has."""
        return frozenset((self.cls, self.sep, self.mask, self.pad))


def masked_tokens(config: ResolvedConfig, tokenizer: Tokenizer | None) -> MaskedTokens:
    """The tokens of a run.

    Args:
        tokenizer: None: a run on token ids, of which each is a word.

    Raises:
        DataError: a flag names a token that the tokenizer does not have.
        ConfigError: `--vocab-size` leaves no room for what is to be added.
    """
    if tokenizer is None:
        size = config.model.vocab_size or 0
        if size <= len(_KINDS):
            raise ConfigError(
                f"vocab_size {size} with model_type bert, expected more than {len(_KINDS)}: its "
                "last tokens are [CLS], [SEP], [MASK] and the padding"
            )
        first = size - len(_KINDS)
        cls, sep, mask, pad = range(first, size)
        return MaskedTokens(cls, sep, mask, pad, first, size, (False,) * size)
    pieces = tokenizer.pieces()
    ids = {piece: index for index, piece in enumerate(pieces) if piece}
    found: dict[str, int] = {}
    size = len(pieces)
    for kind in _KINDS:
        known = _find(kind, config, ids)
        known = tokenizer.pad if known is None and kind == "pad" else known
        found[kind] = size if known is None else known
        size += known is None
    given = config.model.vocab_size
    if given is not None and given < size:
        raise ConfigError(
            f"vocab_size {given} with model_type bert, expected at least {size}: the tokenizer's "
            f"{len(pieces)} and {size - len(pieces)} of BERT that it lacks"
        )
    if len(set(found.values())) < len(_KINDS):
        raise DataError(f"model_type bert: two of its tokens are one, expected four: {found}")
    return MaskedTokens(
        **found, ordinary=len(pieces), vocab_size=size, continues=_continues(pieces, size)
    )


def _find(kind: str, config: ResolvedConfig, ids: dict[str, int]) -> int | None:
    asked = getattr(config.bert, f"{kind}_token", None)
    if asked is not None:
        if asked not in ids:
            raise DataError(f"--{kind}-token {asked!r}: is no token of the tokenizer")
        return ids[asked]
    names = (f"[{kind.upper()}]", f"<{kind.upper()}>", f"<{kind}>")
    return next((ids[name] for name in names if name in ids), None)


def _continues(pieces: list[str], size: int) -> tuple[bool, ...]:
    """WordPiece writes what continues a word with ##. Other tokenizers mark the space before one: a
    letter or digit without such a mark continues."""
    wordpiece = any(len(piece) > 2 and piece.startswith("##") for piece in pieces)
    found = [
        piece.startswith("##") if wordpiece else _goes_on(piece) or piece[:3] == "<0x"
        for piece in pieces
    ]
    return (*found, *(False for _ in range(size - len(pieces))))


def _goes_on(piece: str) -> bool:
    return piece[:1].isalnum() and piece[:1] not in _SPACES
