"""Megatron's checkpoints: megatron-core's own model saved in its layouts, imported, compared."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from tests import dist
from tests.convert.models import TOKENS, VOCAB, megasparse_logits
from tools import convert_checkpoint

PADDED = 144
SIZES = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 64, "seq_length": 32, "padded_vocab_size": PADDED,
}  # fmt: skip
LLAMA = {
    "group_query_attention": True, "num_query_groups": 2, "kv_channels": 12, "swiglu": True,
    "normalization": "RMSNorm", "norm_epsilon": 1e-6, "add_bias_linear": False,
    "position_embedding_type": "rope", "rotary_base": 5000,
    "untie_embeddings_and_output_weights": True, "vocab_size": VOCAB,
}  # fmt: skip
GPT = {
    "group_query_attention": False, "kv_channels": 8, "swiglu": False, "normalization": "LayerNorm",
    "norm_epsilon": 1e-5, "add_bias_linear": True, "position_embedding_type": "learned_absolute",
    "untie_embeddings_and_output_weights": False, "bias_gelu_fusion": True,
}  # fmt: skip
# What newer models have: 2 ranks, norms of queries and keys, a bias in QKV alone, exact GELU.
MODERN = {
    **LLAMA, "swiglu": False, "bias_gelu_fusion": False, "qk_layernorm": True,
    "add_qkv_bias": True, "no_rope_freq": 2, "rotary_percent": 0.5,
}  # fmt: skip


class Attention(int):
    """An enum of Megatron's, in its arguments."""


Attention.__module__ = "megatron.core.transformer.enums"


def build(rank: int, world: int, arguments: dict, stages: int = 1, replicas: int = 1):
    """megatron-core's GPTModel with its own local layers: this rank's part of it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megasparse.megatron.blocks.torch_modules import TorchNorm, gelu_tanh
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.init import initialize_weights
    from megasparse.megatron.model import _mark_vocabulary_shards

    tp = world // stages // replicas
    grid = make_grid(tp, torch.device("cpu"), 1, pipeline_model_parallel_size=stages)
    a = argparse.Namespace(**arguments)
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    plain = gelu_tanh if getattr(a, "bias_gelu_fusion", True) else gelu
    qk_norm = getattr(a, "qk_layernorm", False)
    config = TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        kv_channels=a.kv_channels,
        num_query_groups=a.num_query_groups if a.group_query_attention else a.num_attention_heads,
        normalization=a.normalization,
        layernorm_epsilon=a.norm_epsilon,
        gated_linear_unit=a.swiglu,
        activation_func=silu if a.swiglu else plain,
        add_bias_linear=a.add_bias_linear,
        add_qkv_bias=getattr(a, "add_qkv_bias", False),
        qk_layernorm=qk_norm,
        no_rope_freq=getattr(a, "no_rope_freq", None),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    spec = get_gpt_layer_local_spec(normalization=a.normalization)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TorchNorm
    if qk_norm:
        inner = spec.submodules.self_attention.submodules
        inner.q_layernorm = inner.k_layernorm = TorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    block = TransformerBlockSubmodules([spec] * (a.num_layers // stages), layer_norm=TorchNorm)
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=a.padded_vocab_size,
        max_sequence_length=a.max_position_embeddings,
        pre_process=grid.pp_rank == 0,
        post_process=grid.pp_rank == stages - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=not a.untie_embeddings_and_output_weights,
        position_embedding_type=a.position_embedding_type,
        rotary_base=getattr(a, "rotary_base", 10000),
        rotary_percent=getattr(a, "rotary_percent", 1.0),
    )
    _mark_vocabulary_shards(model)
    initialize_weights(model, 7, 0.1, 2, grid.tp_rank, grid.tp_size)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.dim() == 1 and (tp == 1 or "norm" in name):
                parameter += torch.linspace(0, 0.1 + 0.02 * number, len(parameter))
    return model


def build_and_save(rank: int, world: int, arguments: dict, folder: str) -> torch.Tensor:
    """The model saved by this rank as Megatron-LM does; its logits."""
    model = build(rank, world, arguments)
    path = Path(folder) / f"mp_rank_{rank:02d}"
    path.mkdir(parents=True)
    state = {name: value for name, value in model.state_dict().items() if value is not None}
    content = {
        "args": argparse.Namespace(**arguments, attention_backend=Attention(5)),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": state,
        "rng_state": [{"np": __import__("numpy").random.get_state()}],
    }
    sys.modules["megatron.core.transformer.enums"].Attention = Attention
    torch.save(content, path / "model_optim_rng.pt")
    del sys.modules["megatron.core.transformer.enums"].Attention
    return logits_of(model)


def logits_of(model) -> torch.Tensor:
    """Of TOKENS, on every rank."""
    inputs = torch.tensor(TOKENS)
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    mask = torch.ones(1, 1, inputs.shape[1], inputs.shape[1]).triu(1).bool()
    with torch.no_grad():
        return model.eval()(inputs, positions, mask, runtime_gather_output=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """LLaMA and a newer model on two ranks, GPT on one: folder and logits."""
    folder = tmp_path_factory.mktemp("megatron")
    found = {}
    for name, sizes, world in (("llama", LLAMA, 2), ("gpt", GPT, 1), ("modern", MODERN, 2)):
        root = folder / name
        logits = dist.run(build_and_save, world, {**SIZES, **sizes}, str(root / "iter_0000007"))
        (root / "latest_checkpointed_iteration.txt").write_text("7\n")
        found[name] = (root, logits[0])
    return found


def convert(source: Path, output: Path, *flags: str) -> int:
    arguments = ["--from", "megatron", "--to", "megasparse", "--make-vocab-size-divisible-by", "16"]
    paths = ["--input", str(source), "--output", str(output)]
    return convert_checkpoint.main([*arguments, *paths, *flags])


def check(folder: Path, wanted: torch.Tensor, rows: int) -> None:
    logits = dist.run(megasparse_logits, 1, str(folder))[0]
    assert logits.shape[-1] == rows and wanted.std() > 0.1
    torch.testing.assert_close(logits[..., :VOCAB], wanted[..., :VOCAB], atol=1e-4, rtol=1e-4)


def test_megatron_core(saved, tmp_path):
    (llama, llama_logits), (gpt, gpt_logits) = saved["llama"], saved["gpt"]
    assert convert(llama, tmp_path / "a") == 0  # its arguments say the vocabulary
    check(tmp_path / "a", llama_logits, VOCAB)
    assert convert(gpt, tmp_path / "b", "--vocab-size", str(VOCAB)) == 0
    check(tmp_path / "b", gpt_logits, VOCAB)


def test_newer_models(saved, tmp_path):
    modern, logits = saved["modern"]
    assert convert(modern, tmp_path / "a") == 0
    check(tmp_path / "a", logits, VOCAB)


@pytest.mark.parametrize(
    ("arguments", "field", "found"),
    [
        ({"window_size": (4095, 0)}, "window_size", "4095,0"),
        ({"window_size": "(7,0)", "window_attn_skip_freq": 2}, "window_attn_skip_freq", "2"),
        (
            {"window_size": [7, 0], "window_attn_skip_freq": [0, 1]},
            "window_attn_skip_freq",
            "[0,1]",
        ),
        ({"no_rope_freq": [1, 0]}, "no_rope_freq", "[1,0]"),
    ],
)
def test_windows_and_patterns_in_megatrons_arguments(arguments, field, found):
    from megasparse.convert.megatron.arguments import megatron_config

    model = megatron_config({**SIZES, **LLAMA, **arguments}, "here")
    assert getattr(model, field) == found


@pytest.mark.parametrize("window", [(4095, 5), (-1, 0), "x"])
def test_windows_that_are_not_causal_are_refused(window):
    from megasparse.convert.megatron.arguments import megatron_config
    from megasparse.errors import ConfigError

    with pytest.raises(ConfigError, match="args: window_size: found"):
        megatron_config({**SIZES, **LLAMA, "window_size": window}, "here")


def test_what_megatrons_arguments_do_not_say():
    """Is as Megatron has it."""
    from megasparse.convert.megatron.arguments import megatron_config

    told = ("norm_epsilon", "kv_channels", "rotary_base")
    said = {name: value for name, value in {**SIZES, **LLAMA}.items() if name not in told}
    model = megatron_config(said, "here")
    assert (model.norm_epsilon, model.rotary_base, model.rotary_percent) == (1e-5, 10000, 1.0)
    assert model.rope_scaling_factor == 8.0 and not model.use_rope_scaling
    assert model.kv_channels == 8
    older = megatron_config({**said, "layernorm_epsilon": 1e-3}, "here")
    assert older.norm_epsilon == 1e-3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_weights_are_of_the_type_that_was_asked_for(saved, dtype):
    from megasparse.convert.megatron.model import MegatronModel

    model = MegatronModel(saved["llama"][0], dtype)
    for entry in model.entries():
        value = model.read(entry.name)
        assert value.dtype == entry.dtype == (dtype or torch.float32)
        assert tuple(value.shape) == tuple(entry.shape)


def test_straight_to_hugging_face(saved, tmp_path):
    from tests.convert.models import load_logits

    arguments = ["--from", "megatron", "--to", "huggingface", "--output", str(tmp_path / "hf")]
    assert convert_checkpoint.main([*arguments, "--input", str(saved["llama"][0])]) == 0
    logits = load_logits(tmp_path / "hf", torch.tensor(TOKENS))
    torch.testing.assert_close(logits, saved["llama"][1][..., :VOCAB], atol=1e-4, rtol=1e-4)


def load(saved, name: str, rank: int = 0) -> dict:
    from megasparse.convert.megatron.files import load_weights

    folder = saved[name][0] / "iter_0000007"
    content = load_weights(folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
    arguments = vars(content["args"])
    assert type(arguments.pop("attention_backend")).__name__ == "Record"
    return {
        "args": argparse.Namespace(**arguments),
        "checkpoint_version": 3.0,
        "model": content["model"],
    }


def test_stages_and_fused_norms(saved, tmp_path):
    """Two pipeline stages number their layers alike; Transformer Engine keeps norms in linears."""
    for rank in range(2):
        content = load(saved, "llama", rank)
        for stage in range(2):
            model = {}
            for name, value in content["model"].items():
                if ".layers." in name:
                    if f".layers.{stage}." not in name:
                        continue
                    name = name.replace(f".layers.{stage}.", ".layers.0.")
                    name = name.replace(
                        ".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"
                    ).replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
                elif name.startswith("embedding") != (stage == 0):
                    continue
                model[name] = value
            model["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(1)
            path = tmp_path / "in" / f"mp_rank_{rank:02d}_{stage:03d}"
            path.mkdir(parents=True)
            arguments = argparse.Namespace(**{**LLAMA, **SIZES})
            torch.save({"args": arguments, "model": model}, path / "model_optim_rng.pt")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    check(tmp_path / "out", saved["llama"][1], VOCAB)


# megatron-core's names -> Megatron-DeepSpeed's, within a layer.
OLD = (
    ("pre_mlp_layernorm", "post_attention_layernorm"), ("linear_qkv", "query_key_value"),
    ("self_attention.linear_proj", "self_attention.dense"), ("linear_fc1", "dense_h_to_4h"),
    ("linear_fc2", "dense_4h_to_h"),
)  # fmt: skip


def old_name(name: str) -> str:
    for new, old in OLD:
        name = name.replace(new, old)
    return name


def deepspeed_arguments() -> argparse.Namespace:
    return argparse.Namespace(
        **SIZES,
        kv_channels=12,
        num_key_value_heads=2,
        swiglu=True,
        normalization="rmsnorm",
        layernorm_epsilon=1e-6,
        disable_bias_linear=True,
        use_rotary_position_embeddings=True,
        rope_theta=5000,
        untie_embeddings_and_output_weights=True,
        add_position_embedding=False,
    )


@pytest.mark.parametrize("pipeline", [False, True], ids=["whole", "PipelineModule"])
def test_megatron_deepspeed(saved, tmp_path, pipeline):
    folder = tmp_path / "in" / "global_step7"
    folder.mkdir(parents=True)
    (tmp_path / "in" / "latest").write_text("global_step7")
    for rank in range(2):
        model = load(saved, "llama", rank)["model"]
        language: dict = {"embedding": {"word_embeddings": {}}, "encoder": {}, "output_layer": {}}
        layers: dict[int, dict] = {}
        for name, value in model.items():
            if name.startswith("decoder."):
                language["encoder"][old_name(name.removeprefix("decoder."))] = value
            number, key = 1, old_name(name)
            if name.startswith("decoder.layers."):
                number, key = int(name.split(".")[2]) + 3, old_name(name.split(".", 3)[3])
            elif name == "decoder.final_layernorm.weight":
                number, key = 6, "weight"
            elif name == "output_layer.weight":
                number, key = 7, "lm_head.weight"
                language["output_layer"]["weight"] = value
            else:
                key = name.removeprefix("embedding.")
                language["embedding"]["word_embeddings"]["weight"] = value
            layers.setdefault(number, {})[key] = value
        content: dict = {"args": deepspeed_arguments(), "checkpoint_version": 3.0}
        if pipeline:
            for number, layer in layers.items():
                torch.save(layer, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
        else:
            content["module"] = {"language_model": language}
        torch.save(content, folder / f"mp_rank_{rank:02d}_model_states.pt")
    assert convert(tmp_path / "in", tmp_path / "out", "--vocab-size", str(VOCAB)) == 0
    check(tmp_path / "out", saved["llama"][1], VOCAB)


class _Attack:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self._marker),)


def _save(folder: Path, content: object) -> None:
    (folder / "mp_rank_00").mkdir(parents=True)
    torch.save(content, folder / "mp_rank_00" / "model_optim_rng.pt")


def _bad(case: str, saved, folder: Path) -> None:
    content = load(saved, "gpt")
    model = content["model"]
    if case == "malicious":
        content["args"] = _Attack(folder.parent / "attacked")
    elif case == "no args":
        del content["args"]
    elif case == "missing tensor":
        del model["decoder.layers.1.mlp.linear_fc2.weight"]
    elif case == "unknown tensor":
        model["decoder.layers.1.mlp.router.weight"] = torch.zeros(2)
    elif case == "wrong shape":
        model["decoder.final_layernorm.weight"] = torch.ones(7)
    elif case == "NaN":
        model["decoder.final_layernorm.weight"] = torch.full((32,), float("nan"))
    elif case == "residual":
        content["args"].apply_residual_connection_post_layernorm = True
    elif case == "old order":
        content["checkpoint_version"] = 1.0
    if case == "cut":
        _save(folder, content)
        path = folder / "mp_rank_00" / "model_optim_rng.pt"
        path.write_bytes(path.read_bytes()[:5000])
    elif case == "missing rank":
        _save(folder, content)
        (folder / "mp_rank_00").rename(folder / "mp_rank_01")
    else:
        _save(folder, content)


CASES = {
    "malicious": (66, "mkdir"), "no args": (66, "no args"), "cut": (66, "cannot be loaded"),
    "missing tensor": (66, "decoder.layers.1.mlp.linear_fc2.weight"),
    "unknown tensor": (66, "router"), "wrong shape": (66, "decoder.final_layernorm.weight"),
    "NaN": (66, "NaN"), "residual": (64, "apply_residual_connection"),
    "old order": (66, "order of QKV"),
    "missing rank": (66, "rank 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_files_are_refused(saved, tmp_path, capsys, case):
    code, word = CASES[case]
    _bad(case, saved, tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out") == code
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and word in error[0], error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # nor was the attack run


def test_the_attack_would_have_worked(tmp_path):
    """So that its absence above means something."""
    pickle.loads(pickle.dumps(_Attack(tmp_path / "attacked")))
    assert (tmp_path / "attacked").is_dir()
