"""Conversations in tokens: those that transformers gives, and which of them are answers."""

from __future__ import annotations

import pytest
import transformers

from megasparse.data.chat.conversation import Conversation, conversation_of
from megasparse.data.chat.tokens import ChatEncoder
from megasparse.data.documents import template_of
from megasparse.data.tokenizers.special_tokens import TokenOptions
from megasparse.data.tokenizers.tokenizer import load_tokenizer
from megasparse.errors import DataError
from tests.chats import CHATML, INSTRUCT, MARKED, THINKING, make_tokenizer, message

ONE = [message("user", "Which one?"), message("assistant", "The second.")]
TWO = [*ONE, message("user", "And  then?\n"), message("assistant", "None, I think.")]
WITH_SYSTEM = [message("system", "Be brief."), *TWO]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), None)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder, options=TokenOptions(parse_special=True))


@pytest.fixture
def encoder(folder, tokenizer, tmp_path):
    def make(template, **options):
        path = tmp_path / "template.jinja"
        path.write_text(template)
        return ChatEncoder(tokenizer, template_of(tokenizer, folder, path), **options)

    return make


def answers_of(encoder, tokenizer, messages, **more):
    """The answers, as texts."""
    ids, answers = encoder.encode(Conversation(messages, **more))
    found, before = [], False
    for token, is_answer in zip(ids, answers, strict=True):
        if is_answer and not before:
            found.append([])
        if is_answer:
            found[-1].append(token)
        before = is_answer
    return [tokenizer.decode(answer) for answer in found]


@pytest.mark.parametrize("messages", [ONE, TWO, WITH_SYSTEM], ids=["one", "two", "system"])
@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING, INSTRUCT])
def test_ids_are_those_of_transformers(folder, tokenizer, encoder, template, messages):
    if template == INSTRUCT and messages is WITH_SYSTEM:
        with pytest.raises(DataError, match="refuses the conversation: roles must alternate"):
            encoder(template).encode(Conversation(messages))
        return
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=template == MARKED,
    )
    ours = encoder(template)
    ids, answers = ours.encode(Conversation(messages))
    assert ids == expected["input_ids"]
    if template == MARKED:
        assert [int(a) for a in answers] == expected["assistant_masks"]
    first = messages.index(message("assistant", "The second."))
    prompt = ours.prompt(messages[:first])
    assert ids[: len(prompt)] == prompt and not any(answers[: len(prompt)])
    assert answers[len(prompt)]
    said = theirs.apply_chat_template(
        messages[:first], chat_template=template, add_generation_prompt=True, return_dict=True
    )
    assert prompt == said["input_ids"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["The second.<|im_end|>", "None, I think.<|im_end|>"]),
        (MARKED, ["The second.<|im_end|>", "None, I think.<|im_end|>"]),
        (INSTRUCT, [" The second.<|im_end|>", " None, I think.<|im_end|>"]),
        (
            THINKING,
            ["The second.<|im_end|>", "<think>\n\n</think>\n\nNone, I think.<|im_end|>"],
        ),
    ],
)
def test_answers_go_to_the_token_that_ends_them(tokenizer, encoder, template, expected):
    ours = encoder(template)
    assert answers_of(ours, tokenizer, TWO) == expected
    assert ours.ends() == {tokenizer.eod}
    unlearned = [*TWO[:-1], {**TWO[-1], "weight": 0}]
    assert answers_of(ours, tokenizer, unlearned) == expected[:1]


def test_an_answer_may_end_with_another_token_than_a_document(tokenizer, encoder):
    ours = encoder(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    assert ours.ends() == {tokenizer.eod, tokenizer.control["<|endoftext|>"]}


def test_tools_and_calls_go_to_the_template(tokenizer, encoder):
    template = "{{ tools | tojson }}" + CHATML.replace(
        "m['content']", "(m['content'] or m['tool_calls'] | tojson)"
    )
    call = message("assistant", None, tool_calls=[{"name": "look"}])
    found = answers_of(encoder(template), tokenizer, [ONE[0], call], tools=[{"é": 1}])
    assert found == ['[{"name": "look"}]<|im_end|>']
    assert '[{"é": 1}]' in encoder(template).template.render(ONE, [{"é": 1}])


BROKEN = {
    "end": (CHATML.replace("'<|im_end|>'", "''"), ONE, "ends an answer by 'The second.*a control"),
    "changed": (
        "{%- if messages | length > 2 %}x{%- endif %}" + CHATML,
        TWO,
        "renders what is before messages.1. in another way",
    ),
    "left out": (
        CHATML.replace("m['content']", "(m['content'] if loop.last or m.role == 'user' else '-')"),
        TWO,
        "leaves out messages.1.",
    ),
    "unmarked": (MARKED.replace("== 'assistant' %}", "== 'none' %}"), ONE, "marks 0 answers of 1"),
    "failing": ("{{ messages[9].content }}", ONE, "refuses the conversation"),
    "unsafe": ("{{ messages.__class__.__mro__ }}", ONE, "is unsafe|refuses the conversation"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_does_not_say_where_answers_are_is_refused(encoder, name):
    template, messages, expected = BROKEN[name]
    with pytest.raises(DataError, match=expected):
        encoder(template).encode(Conversation(messages))


def test_control_tokens_come_from_the_template_alone(tokenizer, encoder):
    asked = [message("user", "say <|im_end|> now"), ONE[1]]
    with pytest.raises(DataError, match=r"found the control token '<\|im_end\|>' in a message"):
        encoder(CHATML).encode(Conversation(asked))
    with pytest.raises(DataError, match="in a message"):
        encoder(CHATML).prompt(asked[:1])
    ids, _ = encoder(CHATML, control_in_texts=True).encode(Conversation(asked))
    assert ids.count(tokenizer.eod) == 3


def test_what_is_no_template_is_refused(tmp_path, folder, tokenizer):
    path = tmp_path / "broken.jinja"
    path.write_text("{% for %}")
    with pytest.raises(DataError, match="broken.jinja: found no chat template"):
        template_of(tokenizer, folder, path)
    with pytest.raises(DataError, match="found no chat template beside it"):
        template_of(tokenizer, folder, None)
    with pytest.raises(DataError, match="missing.jinja"):
        template_of(tokenizer, folder, tmp_path / "missing.jinja")
    with pytest.raises(DataError, match="parses no control tokens"):
        ChatEncoder(load_tokenizer(folder), template_of(tokenizer, make_tokenizer(tmp_path), None))


RECORDS = {
    b"{": "broken JSON",
    b"[]": "found a JSON list, expected an object",
    b'{"text": "a"}': "key 'messages' is missing, found 'text'",
    b'{"messages": []}': "found an empty list, expected a list of messages",
    b'{"messages": "a"}': "found str, expected a list of messages",
    b'{"messages": ["a"]}': r"messages\[0\]: found str, expected an object",
    b'{"messages": [{"from": "gpt", "value": "a"}]}': "role is missing, found 'from', 'value'",
    b'{"messages": [{"role": "assistant", "content": null}]}': "content: found null",
    b'{"messages": [{"role": "assistant", "content": ["a"]}]}': "content: found list",
    b'{"messages": [{"role": "user", "content": "a"}]}': "messages of user without an answer",
    b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}': "without an answer",
    b'{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}': "weight: found 2",
    b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}': "half of a surrogate pair",
    b'{"messages": [{"role": "assistant", "content": "a"}], "tools": 1}': "'tools': found int",
}


@pytest.mark.parametrize("record", RECORDS)
def test_what_is_no_conversation_is_refused(record):
    with pytest.raises(DataError, match=RECORDS[record]) as caught:
        conversation_of(record, "messages", "a.jsonl:3")
    assert str(caught.value).startswith("a.jsonl:3")
