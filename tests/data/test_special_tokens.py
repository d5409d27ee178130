"""Which tokens end, begin and pad a document: who is asked first."""

from __future__ import annotations

import pytest

from megasparse.data.tokenizers.special_tokens import (
    BY_THE_FILES,
    EOD_PIECES,
    NOTHING_DECLARED,
    Declared,
    TokenOptions,
    choose,
)

PIECES = [*EOD_PIECES, "<s>", "<pad>", "word"]


def chosen(pieces, options=BY_THE_FILES, declared=NOTHING_DECLARED, own=NOTHING_DECLARED):
    """The tokens of a vocabulary of `pieces`, by their pieces."""
    ids = {piece: number for number, piece in enumerate(pieces)}
    found = choose(options, declared, own, ids.get, len(pieces), "a model")
    return [None if i is None else pieces[i] for i in (found.eod, found.bos, found.pad)]


@pytest.mark.parametrize("first", range(len(EOD_PIECES)))
def test_the_first_of_the_usual_names_ends_a_document(first):
    """Whatever their order in the vocabulary: a dataset keeps its token over releases."""
    present = EOD_PIECES[first:]
    for pieces in (present, present[::-1]):
        assert chosen([*pieces, "word"])[0] == EOD_PIECES[first]


def test_the_usual_names_are_those_of_the_first_release():
    assert EOD_PIECES[:4] == ("<eod>", "<EOD>", "<|endoftext|>", "<|end_of_text|>")
    assert EOD_PIECES.index("</s>") < EOD_PIECES.index("[SEP]")


def test_flags_come_before_files_and_files_before_names_and_the_model():
    declared, own = Declared(eos="</s>", bos="<s>", pad=1), Declared(eos="word", bos="word", pad=2)
    asked = TokenOptions(eod_token="word", bos_token="[SEP]")
    assert chosen(PIECES, asked, declared, own) == ["word", "[SEP]", PIECES[1]]
    assert chosen(PIECES, BY_THE_FILES, declared, own) == ["</s>", "<s>", PIECES[1]]
    assert chosen(PIECES, BY_THE_FILES, NOTHING_DECLARED, own) == ["<eod>", "word", PIECES[2]]
    assert chosen(["word"], BY_THE_FILES, NOTHING_DECLARED, own)[0] == "word"
    assert chosen(["word", "<pad>", "<eod>"]) == ["<eod>", None, "<pad>"]


def test_a_declared_id_beyond_the_vocabulary_is_none():
    assert chosen(["word", "<eod>"], declared=Declared(eos=2, pad=2)) == ["<eod>", None, None]
    assert chosen(["word", "<eod>"], declared=Declared(eos=0))[0] == "word"
