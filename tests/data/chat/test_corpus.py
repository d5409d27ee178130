"""Conversations of Python's own library."""

from __future__ import annotations

import json

import pytest

from megasparse.data.chat.conversation import conversation_of
from megasparse.data.chat.corpus import write_conversations
from megasparse.errors import DataError
from tools import make_corpus


def test_functions_with_a_docstring_are_answers(tmp_path):
    root = tmp_path / "lib"
    (root / "pack").mkdir(parents=True)
    (root / "pack" / "a.py").write_text(
        'def f():\n    """Do this. And\n    that.\n\n    More."""\ndef _g():\n    """No."""\n'
        "def h():\n    pass\n"
    )
    (root / "b.py").write_text("def broken(:\n")
    output = tmp_path / "chats.jsonl"
    assert write_conversations(output, root=root) == 1
    (line,) = output.read_bytes().splitlines()
    assert json.loads(line) == {
        "messages": [
            {"role": "user", "content": "What does pack.a.f do?"},
            {"role": "assistant", "content": "Do this."},
        ]
    }
    with pytest.raises(DataError, match="found no public function"):
        write_conversations(output, root=tmp_path / "lib" / "none")


def test_the_command_writes_as_many_as_asked(tmp_path, capsys):
    output = tmp_path / "chats.jsonl"
    assert make_corpus.main(["--sft", "--output", str(output), "--max-conversations", "30"]) == 0
    assert "30 conversations" in capsys.readouterr().out
    for number, line in enumerate(output.read_bytes().splitlines(), 1):
        conversation_of(line, "messages", f"{output}:{number}")
    assert number == 30
