"""Which tokens begin, end and pad a document: what flags say, else the tokenizer's own files.

Beside a tokenizer's model lie `tokenizer_config.json`, `special_tokens_map.json` and
`generation_config.json` of Hugging Face; the first that names a token decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasparse.data.file_errors import read_error
from megasparse.errors import DataError
from megasparse.input_files import read_regular

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
_MAX_BYTES = 1 << 26

EOD_PIECE = "<eod>"
# Names of the token that ends a document, where no file names it, in the order in which they are
# looked for.
EOD_PIECES = (
    EOD_PIECE,
    "<EOD>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)
_PAD_PIECES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


@dataclass(frozen=True)
class TokenOptions:
    """What flags say of a tokenizer's tokens.

    Attributes:
        eod_token, bos_token: pieces that end and begin a document; None: as the files say.
        add_bos: begin each document with the latter; None: as the files say.
        parse_special: control tokens that are written in a text become those tokens.
    """

    eod_token: str | None = None
    bos_token: str | None = None
    add_bos: bool | None = None
    parse_special: bool = False


@dataclass(frozen=True)
class Declared:
    """What the files beside a model say; pieces, or ids where only those are given."""

    eos: str | int | None = None
    bos: str | int | None = None
    pad: str | int | None = None
    add_bos: bool | None = None
    special: tuple[str, ...] = field(default=())


BY_THE_FILES = TokenOptions()
NOTHING_DECLARED = Declared()


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens in use, by id; None: there is none."""

    eod: int
    bos: int | None
    pad: int | None
    add_bos: bool


def read_declared(folder: Path) -> Declared:
    """What the files in a tokenizer's folder say of its tokens.

    Raises:
        DataError: one of them cannot be read or is no JSON object.
    """
    config, tokens, generation = (
        read_json_object(folder / name)
        for name in (TOKENIZER_CONFIG, TOKENS_MAP, GENERATION_CONFIG)
    )

    def piece(*names: str) -> str | int | None:
        for name in names:
            for source in (config, tokens):
                value = source.get(name)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str) and value:
                    return value
        number = generation.get(f"{names[0]}_id")
        number = number[0] if isinstance(number, list) and number else number
        return number if type(number) is int and number >= 0 else None

    decoder = config.get("added_tokens_decoder")
    entries = decoder.values() if isinstance(decoder, dict) else ()
    special = [
        entry["content"]
        for entry in entries
        if isinstance(entry, dict) and entry.get("special") and isinstance(entry["content"], str)
    ]
    adds = config.get("add_bos_token")
    return Declared(
        eos=piece("eos_token", "sep_token"),
        bos=piece("bos_token", "cls_token"),
        pad=piece("pad_token"),
        add_bos=adds if isinstance(adds, bool) else None,
        special=tuple(special),
    )


def choose(
    options: TokenOptions,
    declared: Declared,
    own: Declared,
    id_of: Callable[[str], int | None],
    vocab_size: int,
    name: str,
) -> SpecialTokens:
    """The tokens to use.

    Args:
        own: what the model itself says; it comes after the files, and after the usual names of
            a token that ends a document.
        id_of: a piece's id, None if there is no such piece.
        vocab_size: one more than the largest id.
        name: of the model, for messages.

    Raises:
        DataError: a flag names a token that is not there, or one that is needed is missing.
    """

    def find(*candidates: str | int | None) -> int | None:
        for candidate in candidates:
            number = id_of(candidate) if isinstance(candidate, str) else candidate
            if number is not None and number < vocab_size:
                return number
        return None

    def asked(piece: str, flag: str) -> int:
        number = id_of(piece)
        if number is None:
            raise DataError(f"{flag} {piece!r}: is no token of {name}")
        return number

    if options.eod_token is not None:
        eod: int | None = asked(options.eod_token, "--eod-token")
    else:
        eod = find(declared.eos, *EOD_PIECES, own.eos)
    if eod is None:
        expected = ", ".join(EOD_PIECES)
        raise DataError(
            f"{name}: found no token that ends a document, expected one of {expected}, or its "
            "name by --eod-token"
        )
    if options.bos_token is not None:
        bos: int | None = asked(options.bos_token, "--bos-token")
    else:
        bos = find(declared.bos, own.bos)
    adds = next(
        (value for value in (options.add_bos, declared.add_bos, own.add_bos) if value is not None),
        False,
    )
    if adds and bos is None:
        raise DataError(
            f"{name}: found no token that begins a document, expected its name by --bos-token, or "
            "--no-add-bos"
        )
    return SpecialTokens(eod, bos, find(declared.pad, own.pad, *_PAD_PIECES), adds)


def read_json_object(path: Path) -> dict[str, Any]:
    """A small JSON file; empty if there is none.

    Raises:
        DataError: it cannot be read, is too large, or is no JSON object.
    """
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: found more than {_MAX_BYTES} bytes, expected a small file")
        content = json.loads(read_regular(path))
    except OSError as error:
        raise read_error(path, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: found no JSON ({error}), expected an object") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: found a JSON {type(content).__name__}, expected an object")
    return content
