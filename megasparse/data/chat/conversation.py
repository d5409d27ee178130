"""A conversation as a record holds it: messages with roles, those of the assistant are answers.

    {"messages": [{"role": "user", "content": "What is 2:4?"},
                  {"role": "assistant", "content": "At most two of four are not zero."}]}

The form of OpenAI's and Hugging Face's chat data, and of Megatron's `--sft`. What else a message
has (`tool_calls`, `name`, ...) goes to the template as it is; `tools` beside the messages too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megasparse.data.chat.template import Message
from megasparse.data.inputs import Payload
from megasparse.data.jsonl import check_text, record_of
from megasparse.errors import DataError

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Conversation:
    """Checked messages.

    Attributes:
        messages: each with "role" and "content".
        tools: that the assistant may call; None: none are told.
    """

    messages: list[Message]
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[int]:
        """Places of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == ASSISTANT]

    def is_trained(self, place: int) -> bool:
        """Whether an answer has a loss: OpenAI's `weight` 0 leaves it out."""
        return bool(self.messages[place].get("weight", 1))

    def texts(self) -> Iterator[str]:
        """All strings in it, those of tools and calls too."""
        yield from _strings(self.messages)
        yield from _strings(self.tools)


def conversation_of(payload: Payload, key: str, where: str) -> Conversation:
    """The conversation under `key` of a record.

    Args:
        payload: of `inputs.read_records`; of a row of Parquet the one value.
        where: "file:line", for the errors.

    Raises:
        DataError: no JSON, no list of messages, a message without role or content, no answer that
            is trained on.
    """
    if isinstance(payload, DataError):
        raise payload
    if isinstance(payload, tuple):
        messages, tools = payload[0], None
    else:
        record = record_of(payload, where)
        if key not in record:
            found = ", ".join(repr(name)[:40] for name in list(record)[:8]) or "none"
            raise DataError(f"{where}: key {key!r} is missing, found {found}")
        messages, tools = record[key], record.get("tools")
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else _kind(messages)
        raise DataError(f"{where}: key {key!r}: found {found}, expected a list of messages")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: key 'tools': found {_kind(tools)}, expected a list")
    for number, message in enumerate(messages):
        _check_message(message, f"{where}: {key}[{number}]")
    made = Conversation(messages, tools)
    if not any(made.is_trained(place) for place in made.answers):
        roles = ", ".join(dict.fromkeys(str(m["role"])[:20] for m in messages))
        raise DataError(
            f"{where}: found messages of {roles} without an answer to train on, expected one of "
            f"the role {ASSISTANT}"
        )
    for text in made.texts():
        check_text(text, f"{where}: key {key!r}")
    return made


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise DataError(f"{where}: found {_kind(message)}, expected an object with role, content")
    for name in ("role", "content"):
        value = message.get(name)
        if name == "content" and value is None and message.get("tool_calls"):
            continue
        if name not in message:
            found = ", ".join(repr(key)[:40] for key in list(message)[:8]) or "none"
            raise DataError(f"{where}: {name} is missing, found {found}")
        if not isinstance(value, str):
            raise DataError(f"{where}: {name}: found {_kind(value)}, expected a string")
    if message.get("weight", 1) not in (0, 1):
        raise DataError(f"{where}: weight: found {message['weight']!r}, expected 0 or 1")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inside in value.items():
            yield from _strings(key)
            yield from _strings(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _strings(inside)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
