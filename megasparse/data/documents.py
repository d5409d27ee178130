"""A record of the input to the tokens of its documents: texts, or a conversation.

Which it is decides once what a worker does with its records, and what bad records are: those that
hold no text, or no conversation that the chat template takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from megasparse.data.chat.conversation import conversation_of
from megasparse.data.chat.template import ChatTemplate, find_template
from megasparse.data.chat.tokens import ChatEncoder
from megasparse.data.inputs import Payload
from megasparse.data.jsonl import texts_of
from megasparse.data.tokenizers.tokenizer import Tokenizer, begin, tokenizer_file_of
from megasparse.errors import DataError


class Document(NamedTuple):
    """Ids of a document; of a conversation also whether each belongs to an answer."""

    ids: list[int]
    answers: list[bool] | None = None


class Documents(Protocol):
    """What makes documents of records.

    Attributes:
        template: of conversations; None: documents are texts.
    """

    template: ChatTemplate | None

    def of(self, payload: Payload, where: str) -> list[Document]:
        """One document for each key; an empty one has no ids.

        Raises:
            DataError: a bad record, by "file:line".
        """
        ...


class TextDocuments:
    """Texts under keys.

    Args:
        append_eod: end each with the tokenizer's end-of-document token.
    """

    template: ChatTemplate | None = None

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer, self._keys = tokenizer, keys
        self._before = begin(tokenizer)
        self._after = [tokenizer.eod] if append_eod else []

    def of(self, payload: Payload, where: str) -> list[Document]:
        return [self._document(text, where) for text in texts_of(payload, self._keys, where)]

    def _document(self, text: str, where: str) -> Document:
        try:
            ids = self._tokenizer.encode(text) if text else []
        except Exception as error:  # the tokenizer libraries raise plain exceptions
            raise TokenizerFailure(where, error) from error
        return Document([*self._before, *ids, *self._after] if ids else [])


class Conversations:
    """Conversations under one key.

    Args:
        control_in_texts: let messages hold names of control tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, key: str, control_in_texts: bool
    ) -> None:
        self.template: ChatTemplate | None = template
        self._encoder, self._key = ChatEncoder(tokenizer, template, control_in_texts), key

    def of(self, payload: Payload, where: str) -> list[Document]:
        conversation = conversation_of(payload, self._key, where)
        try:
            return [Document(*self._encoder.encode(conversation))]
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        except Exception as error:  # as above
            raise TokenizerFailure(where, error) from error


class TokenizerFailure(DataError):
    """The tokenizer itself failed, which is no fault of a record."""

    def __init__(self, where: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200]
        super().__init__(f"{where}: the tokenizer cannot encode this text: {reason}")


def template_of(tokenizer: Tokenizer, tokenizer_model: Path, given: Path | None) -> ChatTemplate:
    """The chat template of a tokenizer, which lies beside it, or one that was given.

    Args:
        tokenizer_model: a tokenizer's file, or its folder.

    Raises:
        DataError: there is none.
    """
    file = tokenizer_file_of(tokenizer_model) if tokenizer_model.is_dir() else tokenizer_model
    return find_template(tokenizer, file or tokenizer_model, given)
