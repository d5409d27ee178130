"""Rows of a family's table, one by one: what a key is read as, written as, and refused for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megasparse.config.layer_patterns import layers_of
from megasparse.convert.huggingface.config_keys import (
    Always,
    Head,
    Must,
    Number,
    Reader,
    Same,
    Size,
    Switch,
    Written,
)
from megasparse.convert.huggingface.expert_keys import ExpertLayers, Experts
from megasparse.convert.huggingface.layer_keys import Activation, NoRope, Window, WindowOfSome
from megasparse.convert.huggingface.rope_keys import Rope
from megasparse.errors import CheckpointError


def read(row, config, **found):
    """What a row adds to settings that are found already."""
    before = dict(found)
    row.read(Reader(config, "config.json"), found)
    return {name: value for name, value in found.items() if before.get(name) != value}


def refused(row, config, words, **found):
    with pytest.raises(CheckpointError, match=f"config.json.*{words}"):
        read(row, config, **found)


def test_values_have_the_type_that_is_asked_for():
    reader = Reader({"a": 1, "b": None, "c": True}, "config.json")
    assert reader.get("a", int) == 1 and type(reader.get("a", float)) is float
    assert reader.get("b", int, 7) == reader.get("d", int, 7) == 7
    assert (reader.says("b"), reader.has("b"), reader.says("d")) == (True, False, False)
    assert reader.has("a")
    for name, kind, words in (
        ("c", int, "c: found True, expected int"),
        ("b", int, "b: found nothing, expected int"),
        ("a", str, "a: found 1, expected str"),
    ):
        with pytest.raises(CheckpointError, match=words):
            reader.get(name, kind)


def test_sizes_begin_with_one():
    row = Size("ours", "theirs", 5)
    assert read(row, {}) == {"ours": 5} and read(row, {"theirs": 1}) == {"ours": 1}
    refused(row, {"theirs": 0}, "theirs: found 0, expected at least 1")
    refused(Size("ours", "theirs"), {}, "theirs: found nothing")
    assert read(Size("ours", "theirs", lambda f: f["n"] * 4), {}, n=2) == {"ours": 8}
    assert row.write(SimpleNamespace(ours=3)) == {"theirs": 3}


def test_numbers_and_switches():
    number = Number("eps", "e", 0.5)
    assert read(number, {}) == {"eps": 0.5} and read(number, {"e": 2}) == {"eps": 2.0}
    assert number.write(SimpleNamespace(eps=0.25)) == {"e": 0.25}
    for inverted in (False, True):
        row = Switch("ours", "theirs", True, inverted)
        for value in (False, True):
            assert read(row, {"theirs": value}) == {"ours": value != inverted}
            assert row.write(SimpleNamespace(ours=value)) == {"theirs": value != inverted}
        assert read(row, {}) == {"ours": not inverted}
        assert read(row, {}, ours=not inverted) == {}
        refused(row, {"theirs": False}, "theirs: found False, expected True", ours=not inverted)
    assert not Switch("ours", "theirs", True).inverted


def test_what_must_be_so():
    row = Must("key", (1, 2), 2)
    assert read(row, {}) == {} == read(row, {"key": 1}) and row.write(None) == {"key": 1}
    refused(row, {"key": 3}, "key: found 3, expected 1 or 2")
    refused(Must("key", (1,), 2), {}, "key: found 2")
    assert Must("key", (1, 2), 2, written=False).write(None) == {}
    same = Same("hidden_size", "width")
    assert read(same, {}, hidden_size=8) == read(same, {"width": 8}, hidden_size=8) == {}
    refused(same, {"width": 4}, "width: found 4, expected 8 or None", hidden_size=8)
    assert same.write(SimpleNamespace(hidden_size=8)) == {"width": 8}


def test_heads():
    sizes = {"hidden_size": 24, "num_attention_heads": 3}
    assert read(Head(), {}, **sizes) == {"kv_channels": 8}
    assert read(Head(), {"head_dim": 5}, **sizes) == {"kv_channels": 5}
    assert read(Head(None), {"head_dim": 5}, **sizes) == {"kv_channels": 8}
    odd = {"hidden_size": 25, "num_attention_heads": 3}
    refused(Head(), {}, "hidden_size 25 is not divisible by num_attention_heads 3", **odd)
    model = SimpleNamespace(kv_channels=5)
    assert Head().write(model) == {"head_dim": 5} and Head(None).write(model) == {}


def test_what_is_not_read_or_not_written():
    assert read(Always({"a": 1, "b": lambda f: f["n"] + 1}), {}, n=1) == {"a": 1, "b": 2}
    assert Always({"a": 1}).write(None) == {} and read(Written({"p": 0.5}), {"p": 3}) == {}
    assert Written({"p": 0.5}).write(None) == {"p": 0.5}


def test_activations():
    row = Activation("act", "gelu", {"gelu": "exact_gelu", "tanh": None, "gelu_tanh": None})
    assert read(row, {}) == {"exact_gelu": True} and read(row, {"act": "tanh"}) == {}
    refused(row, {"act": "silu"}, "act: found 'silu', expected 'gelu' or 'tanh'")


@pytest.mark.parametrize("default", [None, 9])
def test_a_window_counts_the_token_itself(default):
    row = Window(default)
    assert read(row, {"sliding_window": 5}) == {"window_size": "4,0"}
    assert read(row, {"sliding_window": 1}) == {"window_size": "0,0"}
    expected = {} if default is None else {"window_size": "8,0"}
    assert read(row, {}) == expected and read(row, {"sliding_window": None}) == {}
    refused(row, {"sliding_window": 0}, "expected at least 1")
    assert row.write(SimpleNamespace(window=7)) == {"sliding_window": 7}


def test_a_window_with_a_switch_is_there_if_it_is_on():
    row = Window(9, switched=True)
    assert read(row, {}) == {} == read(row, {"sliding_window": 5, "use_sliding_window": False})
    assert read(row, {"use_sliding_window": True}) == {"window_size": "8,0"}
    assert read(row, {"use_sliding_window": True, "sliding_window": 5}) == {"window_size": "4,0"}
    for window in (None, 7):
        written = {"use_sliding_window": window is not None, "sliding_window": window}
        assert row.write(SimpleNamespace(window=window)) == written


def test_windows_of_some_layers():
    row, sliding, full = WindowOfSome(9, "max_window_layers"), "sliding_attention", "full_attention"
    asked = {"use_sliding_window": True}
    assert read(row, {}, num_layers=4) == {}  # unless it is asked for
    assert read(row, asked, num_layers=4) == {}  # from layer 28 on
    found = read(row, asked, num_layers=29)
    assert found["window_size"] == "8,0"
    first = read(row, {**asked, "max_window_layers": 2, "sliding_window": 3}, num_layers=4)
    types = read(
        row, {**asked, "layer_types": [full] * 2 + [sliding] * 2, "sliding_window": 3}, num_layers=4
    )
    assert first == types and first["window_size"] == "2,0"
    windowed = layers_of(first["window_attn_skip_freq"], 4, nth=False)
    assert windowed == [False, False, True, True]
    by_rope = WindowOfSome(5, "no_rope")
    found = read(by_rope, asked, num_layers=4, no_rope_freq="[0,1,1,0]")
    assert layers_of(found["window_attn_skip_freq"], 4, nth=False) == [False, True, True, False]
    none = read(row, {**asked, "max_window_layers": 4}, num_layers=4)
    assert none == {} == read(row, {**asked, "layer_types": [full] * 4}, num_layers=4)
    refused(row, {**asked, "layer_types": [full] * 3}, "layer_types: found", num_layers=4)
    refused(row, {"layer_types": ["odd"] * 4}, "layer_types: found", num_layers=4)
    model = SimpleNamespace(window=None, windowed_layers=[False, True])
    assert row.write(model) == {
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": [full, sliding],
    }
    model.window = 3
    assert row.write(model)["use_sliding_window"]


def test_layers_without_rotary_positions():
    row = NoRope()
    every = read(row, {}, num_layers=8)
    assert every == read(row, {"no_rope_layers": [1, 1, 1, 0] * 2}, num_layers=8)
    assert layers_of(every["no_rope_freq"], 8, nth=True) == [False, False, False, True] * 2
    third = read(row, {"no_rope_layer_interval": 3}, num_layers=6)
    assert third == read(row, {"no_rope_layers": [1, 1, 0] * 2}, num_layers=6) != every
    for odd in ([1, 0], [1, 2, 0]):
        refused(row, {"no_rope_layers": odd}, "expected 3 of 0 or 1", num_layers=3)
    model = SimpleNamespace(layers_without_rope=[False, True])
    assert row.write(model) == {"no_rope_layers": [1, 0]}


def test_experts():
    row = Experts("num_experts", 8)
    assert read(row, {}) == {"num_experts": 8}
    for name in ("num_local_experts", "num_experts"):
        assert read(row, {name: 4}) == {"num_experts": 4}
    assert row.write(SimpleNamespace(num_experts=3)) == {"num_experts": 3}
    layers = ExpertLayers()
    assert read(layers, {}, num_layers=4) == {"moe_layer_freq": "1"}
    third = read(layers, {"decoder_sparse_step": 3}, num_layers=6)
    named = read(layers, {"mlp_only_layers": [0, 1, 3, 4]}, num_layers=6)
    assert third == named != {"moe_layer_freq": "1"}
    refused(layers, {"mlp_only_layers": [True]}, "expected numbers of layers", num_layers=4)
    model = SimpleNamespace(expert_layers=[True, False, True])
    assert layers.write(model) == {"decoder_sparse_step": 1, "mlp_only_layers": [1]}


LLAMA3 = {
    "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
PLAIN = {
    "position_embedding_type": "rope", "rotary_base": 10000, "rotary_percent": 1.0,
    "use_rope_scaling": False, "rope_scaling_factor": 8.0,
}  # fmt: skip


def test_rotary_positions():
    row, sizes = Rope(), {"max_position_embeddings": 8192}
    assert read(row, {}, **sizes) == PLAIN
    old = read(row, {"rope_theta": 5000}, **sizes)
    assert old == {**PLAIN, "rotary_base": 5000}
    assert read(row, {"rope_parameters": {"rope_theta": 5e3}, "rope_theta": 7.0}, **sizes) == old
    refused(row, {"rope_theta": 5000.5}, "rope_theta: found 5000.5, expected a whole number")
    scaled = read(row, {"rope_parameters": LLAMA3}, **sizes)
    assert scaled == {**PLAIN, "use_rope_scaling": True, "rope_scaling_factor": 2.0}
    assert read(row, {"rope_scaling": LLAMA3}, **sizes) == scaled
    for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        odd = {**LLAMA3, name: LLAMA3[name] * 2}
        refused(row, {"rope_parameters": odd}, f"{name}: found", **sizes)
    trained = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    assert read(row, {"rope_parameters": trained}, **sizes) == scaled  # its positions
    above = {"rope_parameters": trained, "original_max_position_embeddings": 8192}
    assert read(row, above, max_position_embeddings=99) == scaled


def test_shares_of_a_head_that_rotates():
    whole, part = Rope(), Rope(percent=0.25, percent_key="rotary_pct")
    assert read(part, {})["rotary_percent"] == 0.25
    assert read(part, {"rotary_pct": 0.5})["rotary_percent"] == 0.5
    new = {"rope_parameters": {"partial_rotary_factor": 1}, "rotary_pct": 0.5}
    assert read(part, new)["rotary_percent"] == 1.0
    for odd in (0.0, 1.5):
        refused(
            part,
            {"rotary_pct": odd},
            "partial_rotary_factor: found",
        )
    for odd in (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
    ):
        refused(whole, odd, "partial_rotary_factor: found 0.5, expected 1.0")


def test_rotary_positions_as_they_are_written():
    model = SimpleNamespace(rotary_base=5000, use_rope_scaling=False, rotary_percent=0.5)
    plain = {"rope_type": "default", "rope_theta": 5000.0}
    assert Rope().write(model) == {
        "rope_parameters": plain,
        "rope_theta": 5000.0,
        "rope_scaling": None,
    }
    written = Rope(theta_key="base", percent=1.0, percent_key="pct").write(model)
    assert written == {
        "rope_parameters": {**plain, "partial_rotary_factor": 0.5},
        "base": 5000.0,
        "rope_scaling": None,
        "pct": 0.5,
    }
    model.use_rope_scaling, model.rope_scaling_factor = True, 2.0
    scaled = {**LLAMA3, "rope_theta": 5000.0}
    assert Rope().write(model) == {
        "rope_parameters": scaled,
        "rope_theta": 5000.0,
        "rope_scaling": scaled,
    }
