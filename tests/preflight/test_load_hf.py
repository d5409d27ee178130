"""`--load-hf`: sizes and tokenizer of the folder, and all that contradicts it at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megasparse.config import read_config
from megasparse.convert.huggingface.architecture import DEFINING
from megasparse.errors import CheckpointError, DataError
from megasparse.preflight.load_hf import take_over

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 112,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "max_position_embeddings": 8192, "vocab_size": 77, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "vocab_size": 90,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def taken(folder: Path, *flags: str):
    config, line = read_config(["--mock-data", "--load-hf", str(folder), *flags])
    assert not line.problems
    return config, take_over(config, line.given)


def test_one_flag_is_enough(folder: Path) -> None:
    config, problems = taken(folder)
    model = config.model
    assert not problems
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (3, 48, 112)
    assert (model.num_attention_heads, model.num_query_groups, model.kv_channels) == (6, 2, 12)
    assert model.swiglu and model.normalization == "RMSNorm" and model.norm_epsilon == 1e-6
    assert model.position_embedding_type == "rope" and model.rotary_base == 500000
    assert (model.vocab_size, model.seq_length, model.max_position_embeddings) == (77, 4096, 8192)
    assert model.disable_bias_linear and model.untie_embeddings_and_output_weights
    assert config.data.tokenizer_model == str(folder / "tokenizer.json")


def test_what_a_run_may_choose(folder: Path) -> None:
    flags = ["--seq-length", "512", "--hidden-dropout", "0.1", "--tokenizer-model", "other.model"]
    config, problems = taken(folder, *flags, "--make-vocab-size-divisible-by", "8")
    assert not problems and config.model.seq_length == 512 and config.model.hidden_dropout == 0.1
    assert Path(config.data.tokenizer_model).name == "other.model"
    config, problems = taken(folder, "--seq-length", "16384")  # rotary positions go on
    assert not problems and config.model.max_position_embeddings == 16384
    config, _ = taken(folder, "--tokenizer-type", "NullTokenizer")
    assert config.data.tokenizer_model is None
    assert not taken(folder, "--num-layers", "3", "--swiglu", "--vocab-size", "77")[1]


def test_all_differences_are_told_at_once(folder: Path) -> None:
    flags = ["--num-layers", "2", "--hidden-size", "64", "--no-swiglu", "--vocab-size", "78"]
    _, (problem,) = taken(folder, *flags, "--num-query-groups", "2", "--rotary-base", "10000")
    for words in (
        "num_layers 3, found 2",
        "hidden_size 48, found 64",
        "swiglu true, found false",
        "vocab_size 77, found 78",
        "rotary_base 500000, found 10000",
    ):
        assert words in problem
    assert "num_query_groups" not in problem and str(folder) in problem


def test_a_yaml_file_is_held_to_it_too(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 7, num_query_groups: null}\n")
    _, (problem,) = taken(folder, "--config", str(path))
    assert "num_layers 3, found 7" in problem and "groups" not in problem


def test_every_defining_setting_comes_from_the_folder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(GPT2))
    config, problems = taken(folder)
    assert not problems and config.model.seq_length == config.model.max_position_embeddings == 64
    may_be_none = {"window_size", "window_attn_skip_freq", "no_rope_freq", "num_experts"}
    may_be_none |= {"moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"}
    assert all(getattr(config.model, name) is not None for name in {*DEFINING} - may_be_none)
    _, (problem,) = taken(folder, "--max-position-embeddings", "128")
    assert "max_position_embeddings 64, found 128" in problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no config.json"),
        ("{", "config.json: found no JSON"),
        ('{"architectures": ["BloomForCausalLM"]}', "unknown architecture 'BloomForCausalLM'"),
    ],
)
def test_a_folder_that_is_no_model(folder: Path, content: str | None, words: str) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises((CheckpointError, DataError), match=words):
        taken(folder)
