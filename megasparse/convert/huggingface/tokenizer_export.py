"""A run's tokenizer as transformers loads it: the ids of the training for every text.

    add_special_tokens=False    the ids of the text
    add_special_tokens=True     before them the token that begins a document, if the run adds it

which is how a document of the training begins; the token that ends it is the model's to give.

A SentencePiece model that no `tokenizer.json` equals goes along as `tokenizer.model`, for the class
of transformers that lets the sentencepiece library itself cut the text. No other way is exact: a
unigram model adds up scores in float32, so which of two cuts wins depends on all text before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasparse.data.tokenizers.hf_tokenizer import HuggingFaceTokenizer, post_processor
from megasparse.data.tokenizers.special_tokens import TOKENIZER_CONFIG, TOKENS_MAP, read_json_object
from megasparse.data.tokenizers.spm_json import tokenizer_json
from megasparse.data.tokenizers.spm_tokenizer import SentencePieceTokenizer
from megasparse.data.tokenizers.tokenizer import (
    MADE_FROM,
    ORIGINAL_JSON,
    ORIGINAL_MODEL,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    Tokenizer,
)
from megasparse.errors import ConfigError
from megasparse.input_files import read_regular
from megasparse.log import logger

_NAMED = ("eos", "bos", "pad", "unk", "sep", "cls", "mask")
# Of the original's tokenizer_config.json: code, and what tokenizer.json says itself.
_DROPPED = (
    "auto_map", "tokenizer_file", "name_or_path", "added_tokens_decoder", "legacy",
    "add_prefix_space", "sp_model_kwargs", "use_default_system_prompt", "backend",
)  # fmt: skip


# Of transformers 5; encodes with sentencepiece, by `tokenizer.model`.
SLOW_CLASS = "SentencePieceBackend"


@dataclass
class TokenizerFiles:
    """Files of a tokenizer by their names in the output: JSON or bytes to write, others to copy."""

    written: dict[str, Any] = field(default_factory=dict)
    copied: dict[str, Path] = field(default_factory=dict)


def exported_tokenizer(tokenizer: Tokenizer, file: Path, max_length: int) -> TokenizerFiles:
    """The files of a run's tokenizer.

    Args:
        tokenizer: as the run used it.
        file: that it was loaded from; what lies beside it (chat template, other special tokens)
            goes along.
        max_length: of a text in tokens.
    """
    found = TokenizerFiles()
    given = read_json_object(file.parent / TOKENIZER_CONFIG)
    config = {key: value for key, value in given.items() if key not in _DROPPED}
    config.pop(MADE_FROM, None)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content: dict[str, Any] | None = tokenizer.content
        unchanged = json.loads(read_regular(file)) == content
        original = TOKENIZER_JSON if unchanged else ORIGINAL_JSON
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        content = tokenizer_json(tokenizer.model)
        if content is not None:
            before = tokenizer.bos_piece if tokenizer.add_bos else None
            content["post_processor"] = post_processor(None, before, tokenizer.bos)
        else:
            config |= _for_sentencepiece(found, tokenizer, file)
        # Datasets are compared with the original.
        unchanged = content is None and TOKENIZER_MODEL not in found.written
        original = TOKENIZER_MODEL if content is not None or unchanged else ORIGINAL_MODEL
    found.copied[original] = file
    if original != TOKENIZER_JSON:
        config[MADE_FROM] = original
        if content is not None:
            found.written[TOKENIZER_JSON] = content
    template = file.parent / "chat_template.jinja"
    if template.is_file():
        found.copied[template.name] = template
    ids = _vocabulary(content, tokenizer)
    tokens = _named_tokens(config, tokenizer, ids)
    config |= tokens
    config |= {
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not tokenizer.parse_special,
    }
    config["tokenizer_class"] = SLOW_CLASS if content is None else "PreTrainedTokenizerFast"
    found.written[TOKENIZER_CONFIG] = config
    found.written[TOKENS_MAP] = {name: value for name, value in tokens.items() if value}
    return found


def _for_sentencepiece(
    found: TokenizerFiles, tokenizer: SentencePieceTokenizer, file: Path
) -> dict[str, Any]:
    """Adds the model as it is used; what tokenizer_config.json says for it.

    Raises:
        ConfigError: the class would give other ids.
    """
    if clash := tokenizer.control_by_unknown():
        raise ConfigError(
            f"{file}: transformers takes the text {clash!r} for the control token of that name, "
            "which the training does not; --no-tokenizer exports without it"
        )
    if tokenizer.model != read_regular(file):
        found.written[TOKENIZER_MODEL] = tokenizer.model
    logger.info(
        "%s: no tokenizer.json gives exactly its ids, so transformers (5 or newer) loads it with "
        "the package sentencepiece; exact texts of ids come from tokenizer.sp_model.decode",
        file,
    )
    special: dict[str, Any] = {"legacy": True}  # adds nothing of its own to the text
    special["special_tokens_pattern"] = "bos" if tokenizer.add_bos else "none"
    if tokenizer.parse_special:
        special["additional_special_tokens"] = tokenizer.control_pieces
    return special


def pad_id(tokenizer: Tokenizer) -> int:
    """The token that fills batches: its own, or the one that ends a document."""
    return tokenizer.eod if tokenizer.pad is None else tokenizer.pad


def _named_tokens(
    config: dict[str, Any], tokenizer: Tokenizer, exists: Callable[[str], bool]
) -> dict[str, Any]:
    """The special tokens by name; those that the vocabulary lacks, transformers would add."""
    named: dict[str, Any] = {}
    for name in _NAMED:
        value = config.get(f"{name}_token")
        piece = value.get("content") if isinstance(value, dict) else value
        named[f"{name}_token"] = piece if isinstance(piece, str) and exists(piece) else None
    named["eos_token"], named["bos_token"] = tokenizer.eod_piece, tokenizer.bos_piece
    named["pad_token"] = tokenizer.pad_piece or tokenizer.eod_piece
    more = config.get("additional_special_tokens")
    if isinstance(more, list):
        pieces = (one.get("content") if isinstance(one, dict) else one for one in more)
        named["additional_special_tokens"] = [
            piece for piece in pieces if isinstance(piece, str) and exists(piece)
        ]
    config.pop("extra_special_tokens", None)
    return named


def _vocabulary(content: dict[str, Any] | None, tokenizer: Tokenizer) -> Callable[[str], bool]:
    if content is None:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        # The unknown token is no text, but transformers would take its name for it.
        return tokenizer.control_pieces.__contains__
    vocabulary = content["model"].get("vocab", {})
    names = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    names |= {token["content"] for token in content["added_tokens"]}
    return names.__contains__
