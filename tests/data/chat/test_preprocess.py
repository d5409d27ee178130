"""Conversations on disk: tokens, mask, sidecar and manifest, whatever the number of workers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megasparse.data import preprocess as pre
from megasparse.data.chat.conversation import Conversation
from megasparse.data.chat.tokens import ChatEncoder
from megasparse.data.documents import template_of
from megasparse.data.indexed import validate
from megasparse.data.manifest import PreprocessOptions
from megasparse.data.sidecar import check_sidecar, mask_path, read_sidecar
from megasparse.data.tokenizers.special_tokens import TokenOptions
from megasparse.data.tokenizers.tokenizer import load_tokenizer, token_rules
from megasparse.errors import DataError
from tests.chats import CHATML, conversations, make_tokenizer, write_conversations
from tools import preprocess_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _run(tmp_path, folder, content=None, **options):
    source = tmp_path / "chats.jsonl"
    if content is None:
        write_conversations(source)
    else:
        source.write_bytes(content)
    prefix = str(tmp_path / options.pop("name", "c"))
    keys = options.pop("json_keys", ("messages",))
    return pre.preprocess(
        PreprocessOptions((source,), prefix, folder, sft=True, json_keys=keys, **options)
    )


def test_tokens_and_mask_are_those_of_the_encoder(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(pre, "BATCH_BYTES", 500)
    (summary,) = _run(tmp_path, folder)
    assert summary.prefix == str(tmp_path / "c_messages_document")
    index = validate(summary.prefix)
    cuts = np.cumsum(index.lengths)[:-1]
    ids = np.split(np.fromfile(f"{summary.prefix}.bin", index.dtype), cuts)
    masks = np.split(np.fromfile(mask_path(summary.prefix), np.uint8), cuts)
    tokenizer = load_tokenizer(folder, options=TokenOptions(parse_special=True))
    encoder = ChatEncoder(tokenizer, template_of(tokenizer, folder, None))
    for record, ours, mask in zip(conversations(), ids, masks, strict=True):
        tokens, answers = encoder.encode(Conversation(record["messages"]))
        assert ours.tolist() == tokens and mask.astype(bool).tolist() == answers
    chat = summary.sidecar.conversations
    assert chat.num_answer_tokens == sum(int(m.sum()) for m in masks) and chat.template == CHATML
    assert check_sidecar(summary.prefix, tokenizer.digest, rules=token_rules(tokenizer))
    manifest = json.loads((tmp_path / "c_manifest.json").read_text())
    assert manifest["tokens"]["parse_special"] and not manifest["tokens"]["append_eod"]
    assert manifest["chat_template"]["sha256"] == encoder.template.digest
    _run(tmp_path, folder, name="w", workers=2)
    for suffix in (".bin", ".idx", ".mask", ".json"):
        names = (tmp_path / f"{name}_messages_document{suffix}" for name in "cw")
        assert len({name.read_bytes() for name in names}) == 1
    with pytest.raises(DataError, match="exists already"):
        _run(tmp_path, folder)


def test_bad_conversations_are_named_and_may_be_left_out(tmp_path, folder):
    good = json.dumps(conversations()[0]).encode()
    unanswered = b'{"messages": [{"role": "user", "content": "a"}]}'
    written = good.replace(b"Which colour", b"<|im_end|>")
    lines = b"\n".join([good, unanswered, written, good, b""])
    with pytest.raises(DataError, match="chats.jsonl:2: found messages of user without an answer"):
        _run(tmp_path, folder, lines)
    assert not list(tmp_path.glob("c_*"))
    (summary,) = _run(tmp_path, folder, lines, on_bad_line="skip")
    assert summary.sidecar.num_documents == 2 and summary.bad.of_input.total() == 2
    assert "chats.jsonl:3: found the control token" in summary.bad.first[1]
    (summary,) = _run(
        tmp_path,
        folder,
        lines,
        name="s",
        on_bad_line="skip",
        tokens=TokenOptions(parse_special=True),
    )
    assert summary.sidecar.num_documents == 3


def test_a_changed_mask_is_found(tmp_path, folder):
    (summary,) = _run(tmp_path, folder)
    path = mask_path(summary.prefix)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"\.mask: found sha256"):
        check_sidecar(summary.prefix)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"\.mask: found .* bytes"):
        check_sidecar(summary.prefix)
    side = tmp_path / "c_messages_document.json"
    side.write_text(side.read_text().replace('"mask_size"', '"size"'))
    with pytest.raises(DataError, match="missing or unknown fields: 'mask_size', 'size'"):
        read_sidecar(summary.prefix)


def test_the_command_says_what_it_made(tmp_path, folder, capsys):
    source = write_conversations(tmp_path / "chats.jsonl")
    template = tmp_path / "own.jinja"
    template.write_text(CHATML)
    flags = ["--input", str(source), "--output-prefix", str(tmp_path / "c")]
    flags += ["--tokenizer-model", str(folder / "tokenizer.json")]
    assert preprocess_data.main([*flags, "--sft", "--chat-template", str(template)]) == 0
    assert "20 documents" in (out := capsys.readouterr().out) and "tokens of answers (" in out
    for wrong, expected in (
        (["--chat-template", str(template)], "chat_template is given without sft"),
        (["--sft", "--json-keys", "a", "b"], "expected one key with sft"),
    ):
        assert preprocess_data.main([*flags, "--overwrite", *wrong]) == 65
        assert expected in capsys.readouterr().err
