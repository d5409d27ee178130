"""A model folder, file by file: what is read, in which type, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megasparse.convert.huggingface import folder as module
from megasparse.convert.huggingface.architecture import model_config
from megasparse.convert.huggingface.folder import HuggingFaceModel, read_json
from megasparse.convert.huggingface.layout import rules
from megasparse.errors import CheckpointError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 6,
    "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 4,
    "vocab_size": 6,
}  # fmt: skip
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
K = "model.layers.0.self_attn.k_proj.weight"
WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _tensors(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Random, by the names of the family."""
    generator, found = torch.Generator().manual_seed(0), {}
    for rule in rules(model_config(config, "here"), config["architectures"][0]):
        for part, shape in zip(rule.parts, rule.part_shapes(), strict=True):
            found[part] = torch.randn(shape, generator=generator).to(dtype)
    return found


def _save(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> HuggingFaceModel:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return HuggingFaceModel(folder)


@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16])
def test_weights_have_the_type_of_their_parts_or_the_one_asked_for(tmp_path, asked):
    """Of parts of two types the one that holds both."""
    tensors = _tensors(LLAMA)
    tensors[K] = tensors[K].float() + 2**-12
    _save(tmp_path, LLAMA, tensors)
    model = HuggingFaceModel(tmp_path, asked)
    dtypes = {entry.name: entry.dtype for entry in model.entries()}
    for rule in rules(model.model, "LlamaForCausalLM"):
        stored = torch.float32 if rule.name == QKV else torch.bfloat16
        value = model.read(rule.name)
        assert value.dtype == dtypes[rule.name] == (asked or stored)
        wanted = rule.join([tensors[part].to(stored) for part in rule.parts])
        assert torch.equal(value, wanted.to(asked or stored))
    half = _tensors(LLAMA)
    half[K] = half[K].half()
    mixed = _save(tmp_path / "half", LLAMA, half)
    assert mixed.read(QKV).dtype == torch.float32  # neither of the two holds the other


def test_a_tied_model_may_have_its_embedding_twice(tmp_path):
    tensors = _tensors(LLAMA)
    twice = {**tensors, HEAD: tensors[WORDS].clone()}
    assert len(_save(tmp_path, LLAMA, twice).entries()) == len(
        _save(tmp_path, LLAMA, tensors).entries()
    )
    for other in (tensors[WORDS] + 1, tensors[WORDS][:5]):
        with pytest.raises(CheckpointError, match="lm_head.weight is not the embedding"):
            _save(tmp_path, LLAMA, {**tensors, HEAD: other})
    own = _save(
        tmp_path, {**LLAMA, "tie_word_embeddings": False}, {**tensors, HEAD: tensors[WORDS] + 1}
    )
    assert torch.equal(own.read("output_layer.weight"), tensors[WORDS] + 1)
    with pytest.raises(CheckpointError, match="no lm_head.weight, but config.json says tie_word"):
        _save(tmp_path, {**LLAMA, "tie_word_embeddings": False}, tensors)
    alone = {HEAD if name == WORDS else name: value for name, value in tensors.items()}
    with pytest.raises(
        CheckpointError, match=r"no model.embed_tokens.weight \(lm_head.weight alone"
    ):
        _save(tmp_path, LLAMA, alone)
    del alone[HEAD]
    with pytest.raises(CheckpointError, match="holds no model.embed_tokens.weight$"):
        _save(tmp_path, LLAMA, alone)


def test_names_of_a_base_model_are_completed(tmp_path):
    """But for the output layer's; where some have the prefix already, none gets it."""
    tensors = _tensors(GPT2)
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    buffers = {"h.0.attn.bias": torch.ones(1), "h.0.attn.masked_bias": torch.ones(1)}
    model = _save(tmp_path, GPT2, {**bare, **buffers})
    whole = _save(tmp_path / "whole", GPT2, tensors)
    for entry in model.entries():
        assert torch.equal(model.read(entry.name), whole.read(entry.name))
    bare["transformer.h.0.ln_1.weight"] = bare.pop("h.0.ln_1.weight")
    with pytest.raises(CheckpointError, match="holds no transformer.wte.weight"):
        _save(tmp_path, GPT2, bare)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({K: torch.zeros(8, 7)}, r"k_proj.weight: found shape \(8, 7\), expected \(8, 8\)"),
        (
            {"model.odd": torch.zeros(2), "model.more": torch.zeros(2)},
            "2 tensors that .*model.more",
        ),
        ({K: torch.zeros(8, 8, dtype=torch.int8)}, "found I8, expected"),
    ],
)
def test_tensors_are_those_of_the_configuration(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        _save(tmp_path, LLAMA, {**_tensors(LLAMA), **change})
    less = _tensors(LLAMA)
    del less[K]
    with pytest.raises(CheckpointError, match=f"holds no {K}, which config.json implies"):
        _save(tmp_path, LLAMA, less)


def test_shards_are_those_of_the_index(tmp_path):
    """What a shard holds beyond it is not read."""
    tensors = _tensors(LLAMA)
    _save(tmp_path, LLAMA, tensors)
    (tmp_path / "model.safetensors").unlink()
    first, second = dict(list(tensors.items())[:3]), dict(list(tensors.items())[3:])
    save_file({**first, "extra": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    mapping: dict[str, Any] = {
        **dict.fromkeys(first, "a.safetensors"),
        **dict.fromkeys(second, "b.safetensors"),
    }

    def read(mapping: Any) -> HuggingFaceModel:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
        return HuggingFaceModel(tmp_path)

    assert torch.equal(read(mapping).read("embedding.word_embeddings.weight"), tensors[WORDS])
    for wrong, words in (
        ({}, "weight_map: expected tensors"),
        ([1], "weight_map: expected tensors"),
        ({**mapping, K: "../a.safetensors"}, "found file '../a.safetensors', expected a name"),
        ({**mapping, K: 3}, "found file 3, expected a name"),
        ({**mapping, K: "c.safetensors"}, f"missing shard .holds {K}"),
        (
            {**mapping, "other": "a.safetensors"},
            "holds no other, which model.safetensors.index.json",
        ),
    ):
        with pytest.raises(CheckpointError, match=words):
            read(wrong)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="found pytorch_model.bin .a pickle"):
        HuggingFaceModel(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        HuggingFaceModel(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [1, "0.5", None, math.nan, math.inf])
def test_scales_are_numbers_of_weights(tmp_path, value):
    model = _save(tmp_path, LLAMA, _tensors(LLAMA))
    assert model.frozen_scales() == {}
    (tmp_path / "s_ste_scale.json").write_text(json.dumps({QKV: 0.5}))
    assert model.frozen_scales() == {QKV: 0.5}
    for wrong in ({QKV: value}, {"odd": 0.5}):
        (tmp_path / "s_ste_scale.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="expected a weight's name and its scale"):
            model.frozen_scales()


def test_small_files_go_along_and_weights_do_not(tmp_path):
    model = _save(tmp_path, LLAMA, _tensors(LLAMA))
    for name in ("tokenizer.json", "merges.txt", "README.md", "other.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "vocab.json").mkdir()
    assert [p.name for p in model.carried_files()] == [
        "config.json",
        "tokenizer.json",
        "merges.txt",
    ]


def test_json_is_an_object_of_bounded_size(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    monkeypatch.setattr(module, "_MAX_JSON_BYTES", 10)
    path.write_text('{"a": 123}')
    assert read_json(path) == {"a": 123}
    for text, words in (
        ('{"a": 1234}', "longer than 10 bytes"),
        ("[1]", "found list, expected an object"),
        ("{", "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_json(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_json(tmp_path / "b.json")
