"""The text beside an exported model says what was written, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megasparse.convert.huggingface.model_card import Facts, model_card

MODEL = SimpleNamespace(num_layers=2, hidden_size=8)
ORIGIN = {"format": "megatron"}


def _record(shape, rows_24=False, both=False):
    return {"shape": shape, "2:4": rows_24, "transposable": both, "density": 0.5}


TENSORS = {
    "up": _record([16, 8], True, True),
    "down": _record([8, 16], True),
    "norm": _record([8]),
}
RULES = {"add_bos": True, "parse_special": False}


def card(tensors=TENSORS, packing=None, facts=None, has_tokenizer=False):
    return model_card(MODEL, ORIGIN, tensors, packing, facts, has_tokenizer)


def test_parameters_and_sparse_tensors_are_counted():
    text = card()
    assert "# 2 layers of 8, 264 parameters\n" in text
    assert "2 of 3 tensors, 1 of them along both dimensions." in text
    assert "| `up` | 16 x 8 | 0.500 |\n| `down` | 8 x 16 | 0.500 |" in text and "`norm`" not in text
    assert "No matrix." in card({"norm": _record([8])})


def test_training_is_what_is_known_of_it():
    assert "Converted from weights in the format megatron." in card()
    text = card(facts=Facts("fst", 1234, ["a", "b"], 1000, 16, {"validation loss": 2.5}))
    for line in (
        "- recipe: `fst`, step 1,234",
        "- 1,000 sequences of 16 tokens (16,000)",
        "- data: `a`, `b`",
        "- validation loss: 2.5000",
    ):
        assert f"{line}\n" in text
    assert "Converted" not in text
    assert "chat template" not in card(
        facts=Facts("fst", 1, tokens=RULES), has_tokenizer=True
    ) and "chat template" in card(
        facts=Facts("fst", 1, tokens=RULES, is_chat=True), has_tokenizer=True
    )
    short = card(facts=Facts("fst", 1))
    assert "sequences" not in short and "data:" not in short


@pytest.mark.parametrize("has_tokenizer", [True, False])
@pytest.mark.parametrize("tokens", [RULES, {}])
def test_a_tokenizer_is_told_of_where_there_is_one(has_tokenizer, tokens):
    text = card(facts=Facts("fst", 1, tokens=tokens), has_tokenizer=has_tokenizer)
    assert "AutoModelForCausalLM" in text
    assert ("AutoTokenizer" in text) == has_tokenizer
    told = has_tokenizer and bool(tokens)
    assert ("begins with the BOS token" in text) == told
    assert ("are text." in text) == told


def test_the_rules_of_the_tokens_are_those_of_the_run():
    rules = {"add_bos": False, "parse_special": True}
    text = card(facts=Facts("fst", 1, tokens=rules), has_tokenizer=True)
    assert "has no token before it" in text and "become those tokens." in text


def test_packed_matrices_are_not_loaded_by_transformers():
    text = card(packing="torch", facts=Facts("fst", 1, tokens=RULES), has_tokenizer=True)
    assert "They are packed (torch)" in text and "transformers.Auto" not in text
