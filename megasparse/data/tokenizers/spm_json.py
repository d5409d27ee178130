"""A SentencePiece model as a Hugging Face `tokenizer.json` that gives the same ids.

Engines read a `tokenizer.model` in different ways: transformers before 5 (seen with 4.57) puts a
space before every text, whatever the model says. A `tokenizer.json` is read as it is written, so an
export carries both. Only BPE models that leave text as it is, but for a space put before it, are
converted: those of `train_sentencepiece` and of Llama 2. Unigram ones are not: among equally likely
ways to cut a text the two libraries choose differently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

_ModelProto = model_pb2.ModelProto  # type: ignore[attr-defined]

# Proof of a conversion: ids and text of these are compared.
_PROBES = (
    "def f(x):\n\tif x:\n\t\treturn 1\n\n\n    y = 2\r\n",
    "  two  spaces, one at the end ",
    "a",
    "caf\u00e9 cafe\u0301 \ufb01 \u2460 \u00a0 \u3000 \u65e5\u672c \U0001f389\u200d\U0001f525",
    "<eod> </s> <s> <unk> <0x41> <|endoftext|> \x00\x7f",
    "The quick brown fox jumps over the lazy dog. 1234567890 THE QUICK BROWN FOX!",
)


def tokenizer_json(model: bytes) -> dict[str, Any] | None:
    """The content of a `tokenizer.json` for a SentencePiece model (BPE).

    Args:
        model: of a `.model` file that `load_tokenizer` has loaded (and with it found harmless).

    Returns:
        None if the model changes its text, is of another kind, or the conversion does not give
        the same ids and texts for a set of difficult ones.
    """
    proto = _ModelProto()
    proto.ParseFromString(model)
    rules, trained = proto.normalizer_spec, proto.trainer_spec
    changes = rules.remove_extra_whitespaces or trained.treat_whitespace_as_suffix
    changes = changes or rules.precompiled_charsmap or not rules.escape_whitespaces
    if changes or not trained.byte_fallback or trained.model_type != trained.BPE:
        return None
    types = _ModelProto.SentencePiece
    kinds = {piece.type for piece in proto.pieces}
    if not kinds <= {types.NORMAL, types.CONTROL, types.UNKNOWN, types.BYTE, types.USER_DEFINED}:
        return None
    symbols = [piece.piece for piece in proto.pieces if piece.type == types.USER_DEFINED]
    # A space is put before a text, but a `tokenizer.json` puts one before each part of it.
    if symbols and (rules.add_dummy_prefix or any("\u2581" in symbol for symbol in symbols)):
        return None
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == types.NORMAL}
    names = [piece.piece for piece in proto.pieces]
    unknown = next(piece.piece for piece in proto.pieces if piece.type == types.UNKNOWN)
    tokenizer = Tokenizer(_bpe(names, scores, unknown))
    spaces: normalizers.Normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = spaces, decoders.Sequence(steps)
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    special = [
        piece.piece for piece in proto.pieces if piece.type in (types.CONTROL, types.UNKNOWN)
    ]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in special]
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return json.loads(tokenizer.to_str()) if _same(tokenizer, processor, symbols) else None


def _bpe(names: list[str], scores: Mapping[str, float], unknown: str) -> models.BPE:
    """SentencePiece joins the neighbours whose piece has the best score, so these are merges."""
    ids = {name: number for number, name in enumerate(names)}
    merges = [
        (-score, ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return models.BPE(
        vocab=ids,
        merges=[merge[3:] for merge in sorted(merges)],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )


def _same(
    tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor, symbols: list[str]
) -> bool:
    tokenizer.encode_special_tokens = True  # "<eod>" in a text is text; not kept in the file
    for text in (*_PROBES, "a".join(symbols), " ".join(symbols)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != processor.encode(text):
            return False
        if tokenizer.decode(ids, skip_special_tokens=False) != processor.decode(ids):
            return False
    return True
