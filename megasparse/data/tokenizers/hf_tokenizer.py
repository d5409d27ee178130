"""A `tokenizer.json` whose control tokens no text can produce, for training and for export alike.

What is trained with is the file with small changes, and an export writes that changed file, so
that both give the same ids for every text:

- nothing is cut or padded, and nothing is put around a text but, by `add_special_tokens`, the
  token that begins a document (where the run adds it);
- tokens that end, begin or pad a document are marked special, so that `encode_special_tokens`
  (`split_special_tokens` of transformers) keeps text from becoming them;
- where a model has such a token in its own vocabulary (T5, WordLevel), its name is cut in two
  before the model sees it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from megasparse.data.tokenizers.special_tokens import (
    BY_THE_FILES,
    NOTHING_DECLARED,
    Declared,
    TokenOptions,
    choose,
)
from megasparse.errors import DataError


class HuggingFaceTokenizer:
    """A `tokenizer.json` from its bytes; needs no `transformers` and runs no code of the model.

    Args:
        model: the file's bytes.
        name: of the file, for messages.
        declared: what the files beside it say.
        options: what flags say.

    Attributes:
        content: the tokenizer as it is used, as the JSON of a `tokenizer.json`.
        control: ids of the special tokens, by their names.
    """

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(
        self,
        model: bytes,
        name: str,
        declared: Declared = NOTHING_DECLARED,
        options: TokenOptions = BY_THE_FILES,
    ) -> None:
        original = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        original.no_truncation()
        original.no_padding()
        ids = original.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise DataError(f"{name}: found an empty vocabulary, expected at least one token")
        self.vocab_size = max(ids) + 1  # ids may have holes
        self.digest = hashlib.sha256(model).hexdigest()
        own = _own(original)
        chosen = choose(options, declared, own, original.token_to_id, self.vocab_size, name)
        self.eod, self.bos, self.pad = chosen.eod, chosen.bos, chosen.pad
        self.add_bos, self.parse_special = chosen.add_bos, options.parse_special
        self.eod_piece = original.id_to_token(self.eod) or ""
        self.bos_piece = None if self.bos is None else original.id_to_token(self.bos)
        self.pad_piece = None if self.pad is None else original.id_to_token(self.pad)
        self.content = json.loads(model.decode("utf-8"))
        self.content.setdefault("added_tokens", [])
        self.content["truncation"] = self.content["padding"] = None
        used = [i for i in (self.eod, self.bos, self.pad) if i is not None]
        control = {index: original.id_to_token(index) or "" for index in used}
        names = {*control.values(), *declared.special}
        _mark_special(self.content, control, names)
        self.content["post_processor"] = post_processor(
            self.content.get("post_processor"), self.bos_piece if self.add_bos else None, self.bos
        )
        added = self.content["added_tokens"]
        self.control = {token["content"]: token["id"] for token in added if token["special"]}
        self._tokenizer = self._build()
        if not self.parse_special:
            self._keep_text_out(names, name)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def pieces(self) -> list[str]:
        names = [""] * self.vocab_size
        for piece, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            names[index] = piece
        return names

    def _build(self) -> tokenizers.Tokenizer:
        built = tokenizers.Tokenizer.from_str(json.dumps(self.content))
        built.encode_special_tokens = not self.parse_special  # "<eod>" in a text is text
        return built

    def _keep_text_out(self, names: Iterable[str], name: str) -> None:
        """Cut the names of control tokens that the model itself would take for those."""
        unknown = self.content["model"].get("unk_token")
        marked = [token["content"] for token in self.content["added_tokens"] if token["special"]]
        pieces = sorted({*names, *marked} - {unknown})
        reached = [piece for piece in pieces if self._reaches(piece)]
        if not reached:
            return
        cuts = [_cut(piece) for piece in reached if len(piece) > 1]
        before = self.content.get("pre_tokenizer")
        steps = [] if before is None else [before]
        self.content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, *cuts]}
        self._tokenizer = self._build()
        for piece in reached:
            if piece in names and self._reaches(piece):
                raise DataError(
                    f"{name}: the text {piece!r} becomes the control token of that name, expected "
                    "a tokenizer that can tell them apart; --parse-special allows it"
                )

    def _reaches(self, piece: str) -> bool:
        number = self._tokenizer.token_to_id(piece)
        return any(number in self.encode(text) for text in (piece, f"a {piece} a", f"a{piece}a"))


def _own(model: tokenizers.Tokenizer) -> Declared:
    """What the model's post-processor puts before a text."""
    with_special = model.encode("a", add_special_tokens=True).ids
    alone = model.encode("a", add_special_tokens=False).ids
    added = len(with_special) - len(alone)
    starts = added and alone and with_special[1 : 1 + len(alone)] == alone
    return Declared(bos=with_special[0], add_bos=True) if starts else NOTHING_DECLARED


def _mark_special(content: dict[str, Any], control: dict[int, str], names: set[str]) -> None:
    listed = content["added_tokens"]
    for token in listed:
        if token["content"] in names:
            token["special"] = True
    missing = control.keys() - {token["id"] for token in listed}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    listed += [{"id": i, "content": control[i], **plain, "special": True} for i in missing]
    listed.sort(key=lambda token: token["id"])


def post_processor(given: Any, bos_piece: str | None, bos: int | None) -> Any:
    """Byte-level offsets as they were, and the token that begins a document if there is one."""
    steps = given.get("processors", []) if given and given.get("type") == "Sequence" else [given]
    kept = [step for step in steps if step and step.get("type") == "ByteLevel"]
    if bos_piece is not None:
        begin = {"SpecialToken": {"id": bos_piece, "type_id": 0}}
        first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
        kept.append(
            {
                "type": "TemplateProcessing",
                "single": [begin, first],
                "pair": [begin, first, second],
                "special_tokens": {
                    bos_piece: {"id": bos_piece, "ids": [bos], "tokens": [bos_piece]}
                },
            }
        )
    if len(kept) > 1:
        return {"type": "Sequence", "processors": kept}
    return kept[0] if kept else None


def _cut(piece: str) -> dict[str, Any]:
    """A step that cuts a piece after its first character; it matches nothing but that place."""
    pattern = f"(?<={re.escape(piece[0])})(?={re.escape(piece[1:])})"
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
