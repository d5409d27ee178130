"""A SentencePiece model whose control tokens no text can produce."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from megasparse.data.tokenizers.special_tokens import (
    BY_THE_FILES,
    NOTHING_DECLARED,
    Declared,
    TokenOptions,
    choose,
)

ModelProto = model_pb2.ModelProto  # type: ignore[attr-defined]


class SentencePieceTokenizer:
    """A SentencePiece model from the bytes of its `.model` file.

    A piece that ends, begins or pads a document and that text could produce (a user-defined symbol,
    an ordinary piece) becomes a control symbol. U+2581 in a text is how SentencePiece writes a
    space and decodes as one; all else comes back exactly when the model was trained by
    `train_sentencepiece`.

    Args:
        model: the file's bytes.
        name: of the file, for messages.
        declared: what the files beside it say.
        options: what flags say.

    Attributes:
        model: the model as it is used, as the bytes of a `.model` file.
        control: ids of the tokens that no text becomes, by their names.
    """

    tokenizer_type = "SentencePieceTokenizer"

    def __init__(
        self,
        model: bytes,
        name: str,
        declared: Declared = NOTHING_DECLARED,
        options: TokenOptions = BY_THE_FILES,
    ) -> None:
        original = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = original.vocab_size()
        self.digest = hashlib.sha256(model).hexdigest()
        self._processor = original
        eos, bos, pad = (_present(i()) for i in (original.eos_id, original.bos_id, original.pad_id))
        own = Declared(eos, bos, pad)
        chosen = choose(options, declared, own, self._id_of, self.vocab_size, name)
        self.eod, self.bos, self.pad = chosen.eod, chosen.bos, chosen.pad
        self.add_bos, self.parse_special = chosen.add_bos, options.parse_special
        self.eod_piece = original.id_to_piece(self.eod)
        self.bos_piece = None if self.bos is None else original.id_to_piece(self.bos)
        self.pad_piece = None if self.pad is None else original.id_to_piece(self.pad)
        special = [self._id_of(piece) for piece in declared.special]
        self.model = _with_control(model, {self.eod, self.bos, self.pad, *special} - {None})
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        control = {
            self._processor.id_to_piece(index): index
            for index in range(self.vocab_size)
            if self._processor.is_control(index)
        }
        longest_first = sorted(control, key=len, reverse=True)
        self.control = control
        self._names = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str) -> list[int]:
        if not self.parse_special or not self.control:
            return self._processor.encode(text)
        ids: list[int] = []
        for part in self._names.split(text):
            known = self.control.get(part)
            ids += [known] if known is not None else self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(index) for index in range(self.vocab_size)]

    @property
    def control_pieces(self) -> list[str]:
        """Names of the tokens that no text becomes, by id."""
        return sorted(self.control, key=self.control.__getitem__)

    def control_by_unknown(self) -> str | None:
        """A text that its pieces' names make a control token of; None: there is none.

        Without byte fallback an unknown text is a piece of its own name, which a library that goes
        from names to ids takes for the token of that name.
        """
        for name in self.control:
            named = [
                self._processor.piece_to_id(p) for p in self._processor.encode(name, out_type=str)
            ]
            if named != self._processor.encode(name):
                return name
        return None

    def _id_of(self, piece: str) -> int | None:
        index = self._processor.piece_to_id(piece)
        # An unknown piece gives the id of unk.
        return index if self._processor.id_to_piece(index) == piece else None


def _present(index: int) -> int | None:
    return index if index >= 0 else None


def _with_control(model: bytes, wanted: set[int | None]) -> bytes:
    """The model with those pieces as control symbols; its own bytes if they are."""
    proto = ModelProto()
    proto.ParseFromString(model)
    types = ModelProto.SentencePiece
    changed = False
    for index in wanted:
        if index is not None and proto.pieces[index].type in (types.USER_DEFINED, types.NORMAL):
            proto.pieces[index].type = types.CONTROL
            changed = True
    return proto.SerializeToString() if changed else model
