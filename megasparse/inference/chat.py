"""The chat template that a model answers in: of its fine-tuning, or of its tokenizer's files."""

from __future__ import annotations

from pathlib import Path

from megasparse.checkpoint.model import StoredModel
from megasparse.convert.export import ExportOptions
from megasparse.convert.source import Source
from megasparse.data.chat.template import (
    CHAT_TEMPLATE,
    ChatTemplate,
    find_template,
    named_tokens,
)
from megasparse.data.chat.tokens import ChatEncoder
from megasparse.data.tokenizers.special_tokens import TOKENIZER_CONFIG, read_json_object
from megasparse.data.tokenizers.tokenizer import Tokenizer

_KEY = "chat_template"


def chat_encoder(
    source: Source,
    tokenizer: Tokenizer,
    file: Path,
    given: Path | None = None,
    control_in_texts: bool = False,
) -> ChatEncoder:
    """What makes prompts of messages.

    Args:
        source: of the weights; a fine-tuned run knows its template.
        file: of the tokenizer, which parses control tokens.
        given: file of another template.
        control_in_texts: let messages hold names of control tokens.

    Raises:
        DataError: there is no template.
    """
    text = _trained_with(source)
    if given is not None or text is None:
        template = find_template(tokenizer, file, given)
    else:
        names = named_tokens(tokenizer, read_json_object(file.parent / TOKENIZER_CONFIG))
        template = ChatTemplate(text, names, source.where)
    return ChatEncoder(tokenizer, template, control_in_texts)


def add_chat_template(
    options: ExportOptions, stored: StoredModel, tokenizer: Tokenizer, file: Path
) -> None:
    """Let an export have the template of its run's conversations; of other runs nothing changes.

    Args:
        options: with the files of the tokenizer.
        file: of the tokenizer.
    """
    text = _trained_with(stored)
    if text is None:
        return
    options.carried.pop(CHAT_TEMPLATE, None)
    options.extra_files[CHAT_TEMPLATE] = text.encode()
    options.extra_files[TOKENIZER_CONFIG].pop(_KEY, None)
    encoder = chat_encoder(stored, tokenizer, file)
    options.stops = sorted(encoder.ends() - {tokenizer.eod})
    if options.facts is not None:
        options.facts.is_chat = True


def _trained_with(source: Source) -> str | None:
    if not isinstance(source, StoredModel):
        return None
    text = source.reader.meta["state"].get(_KEY)
    return text if isinstance(text, str) else None
