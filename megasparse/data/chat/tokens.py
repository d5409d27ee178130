"""A conversation in tokens, with the tokens of its answers marked.

What stands before an answer is encoded as it is when the model is asked to answer: the template up
to its generation prompt. An answer goes from there to the control token that ends it, which is
trained on: a model has to learn to stop. White space behind it belongs to the template.

Where an answer begins, the template says: by its `{% generation %}` marks, or by what it renders of
the messages before with a generation prompt. If that is not how the whole conversation begins, or
no control token ends an answer, the conversation is refused.

Control tokens come from the template alone. A message that holds the name of one is refused, unless
`parse_special` is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megasparse.data.chat.conversation import ASSISTANT, Conversation
from megasparse.data.chat.template import ChatTemplate, Message
from megasparse.data.tokenizers.tokenizer import Tokenizer
from megasparse.errors import DataError

Span = tuple[int, int]


class ChatEncoder:
    """Conversations and prompts to tokens.

    Args:
        tokenizer: that makes control tokens of their names (`parse_special`).
        template: of the tokenizer.
        control_in_texts: let messages hold names of control tokens.

    Raises:
        DataError: the tokenizer has no control tokens, or does not parse them.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, control_in_texts: bool = False
    ) -> None:
        if not tokenizer.control or not tokenizer.parse_special:
            raise DataError(
                "found a tokenizer that parses no control tokens, expected one with parse_special "
                "for chat templates"
            )
        self.tokenizer, self.template = tokenizer, template
        self._control_in_texts = control_in_texts
        longest_first = sorted(tokenizer.control, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)))
        self._ids = frozenset(tokenizer.control.values())

    def encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Ids of the whole conversation, and for each whether it belongs to an answer.

        Raises:
            DataError: the template refuses it or does not say where its answers are, no control
                token ends an answer, or a message holds the name of a control token.
        """
        self._check_texts(conversation)
        text, spans = self._spans(conversation)
        ids, answers = self.tokenizer.encode(text[: spans[0][0]]) if spans[0][0] else [], []
        answers += [False] * len(ids)
        ends = [start for start, _ in spans[1:]] + [len(text)]
        for place, (start, stop), end in zip(conversation.answers, spans, ends, strict=True):
            part = self.tokenizer.encode(text[start:end])
            length = self._answer_length(part, text[start:stop])
            trained = conversation.is_trained(place)
            ids += part
            answers += [trained] * length + [False] * (len(part) - length)
        return ids, answers

    def prompt(self, messages: Sequence[Message], tools: list | None = None) -> list[int]:
        """Ids that an answer is to follow; raises as `encode`."""
        self._check_texts(Conversation(list(messages), tools))
        return self.tokenizer.encode(self.template.render(messages, tools, True))

    def ends(self) -> set[int]:
        """Control tokens that end an answer."""
        found = {self.tokenizer.eod}
        try:
            probe = Conversation([_message("user", "?"), _message(ASSISTANT, "!")])
            ids, answers = self.encode(probe)
            found.add([i for i, is_answer in zip(ids, answers, strict=True) if is_answer][-1])
        except DataError:
            pass  # a template for conversations of another kind
        return found

    def _check_texts(self, conversation: Conversation) -> None:
        if self._control_in_texts:
            return
        for text in conversation.texts():
            if found := self._names.search(text):
                raise DataError(
                    f"found the control token {found[0]!r} in a message, expected text alone "
                    "(--parse-special takes it for that token)"
                )

    def _spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text, and where each answer is in it."""
        messages, tools = conversation.messages, conversation.tools
        if not self.template.marks_answers:
            text = self.template.render(messages, tools)
            return text, [self._span(conversation, i, text) for i in conversation.answers]
        text, spans = self.template.render_marked(messages, tools)
        wanted = len(conversation.answers)
        if len(spans) != wanted:
            raise DataError(
                f"the chat template marks {len(spans)} answers of {wanted}, expected one for each "
                "message of the assistant"
            )
        return text, spans

    def _span(self, conversation: Conversation, place: int, text: str) -> Span:
        """Where the answer at `place` is in the text of the whole conversation."""
        messages, tools = conversation.messages, conversation.tools
        before = self.template.render(messages[:place], tools, True)
        if not text.startswith(before):
            raise DataError(
                f"the chat template renders what is before messages[{place}] in another way when "
                "more follows, so that no prompt leads to this answer; expected a template that "
                "does not, or that marks answers by {% generation %}"
            )
        through = self.template.render(messages[: place + 1], tools)
        if through.startswith(before) and text.startswith(through):
            return len(before), len(through)
        # Of an earlier answer some templates leave out a part (thinking) once more follows.
        content = (messages[place]["content"] or "").strip()
        at = text.find(content, len(before)) if content else -1
        if at < 0:
            raise DataError(
                f"the chat template leaves out messages[{place}], or a part of it, when more "
                "follows; expected a template that does not, or that marks answers by "
                "{% generation %}"
            )
        behind = self._names.match(text, _after_space(text, at + len(content)))
        return len(before), behind.end() if behind else at + len(content)

    def _answer_length(self, ids: list[int], text: str) -> int:
        """Tokens of an answer, up to the last control token of its text.

        Args:
            ids: of the answer and of what follows up to the next one.
        """
        names = list(self._names.finditer(text))
        if not names or text[names[-1].end() :].strip():
            raise DataError(
                f"the chat template ends an answer by {text[-20:]!r}, expected a control token "
                f"such as eos_token ({self.tokenizer.eod_piece}): a model could not learn to stop"
            )
        left = len(names)
        for number, token in enumerate(ids):
            left -= token in self._ids
            if not left:
                return number + 1
        raise DataError(
            f"the tokenizer does not make control tokens of all of {[n[0] for n in names]}"
        )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
