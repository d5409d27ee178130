"""What megatron-core is told of a run, setting by setting, and what is done to a built model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.errors import ConfigError
from megasparse.megatron import model as module
from megasparse.megatron.blocks.residual import ResidualLayer
from megasparse.megatron.model import layer_style, spec_provider, transformer_config
from megasparse.megatron.spec import (
    LayerStyle,
    SparseSpecProvider,
    get_block_spec,
    get_layer_spec,
)
from tests.runs import LLAMA, TINY

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EXPERTS = ["--num-experts", "4", "--moe-layer-freq", "[0,1]", "--moe-ffn-hidden-size", "32"]


def _config(*flags: str, world: int = 1) -> Any:
    return resolve(load_config([*TINY, "--mock-data", *flags]), world)


def _layers(*flags: str, world: int = 1, device: torch.device = CPU) -> Any:
    return transformer_config(_config(*flags, world=world), device)


def test_a_plain_model_has_nothing_that_was_not_asked_for():
    layers = _layers()
    assert (layers.num_layers, layers.hidden_size, layers.num_attention_heads) == (2, 64, 4)
    assert layers.params_dtype is layers.pipeline_dtype is torch.float32 and not layers.bf16
    assert layers.window_size is None and not any(layers.no_rope_freq or ())
    assert layers.num_moe_experts is None and not layers.gated_linear_unit
    assert layers.add_bias_linear and layers.use_cpu_initialization
    assert layers.hidden_dropout == layers.attention_dropout == 0.0
    for name in (
        "perform_initialization",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "use_te_activation_func",
        "apply_rope_fusion",
        "gradient_accumulation_fusion",
        "cross_entropy_loss_fusion",
        "persist_layer_norm",
        "sequence_parallel",
        "deterministic_mode",
        "qk_layernorm",
        "add_qkv_bias",
    ):
        assert getattr(layers, name) is False, name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--bf16"],
            {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16},
        ),
        (
            LLAMA,
            {
                "gated_linear_unit": True,
                "use_te_activation_func": True,
                "add_bias_linear": False,
                "normalization": "RMSNorm",
                "num_query_groups": 2,
                "ffn_hidden_size": 96,
                "activation_func": torch.nn.functional.silu,
            },
        ),
        (
            ["--hidden-dropout", "0.25", "--attention-dropout", "0.5"],
            {"hidden_dropout": 0.25, "attention_dropout": 0.5},
        ),
        (["--norm-epsilon", "1e-3"], {"layernorm_epsilon": 1e-3}),
        (
            [*LLAMA, "--window-size", "7,0", "--window-attn-skip-freq", "2", "--no-rope-freq", "2"],
            {"window_size": (7, 0)},
        ),
        (["--qk-layernorm"], {"qk_layernorm": True}),
        (
            [
                "--recompute-granularity",
                "full",
                "--recompute-method",
                "block",
                "--recompute-num-layers",
                "1",
            ],
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 1,
            },
        ),
    ],
)
def test_each_setting_reaches_the_layers(flags, expected):
    layers = _layers(*flags)
    for name, value in expected.items():
        assert getattr(layers, name) == value, name


def test_layers_without_window_or_rotary_positions_are_those_of_the_settings():
    flags = [*LLAMA, "--window-size", "7,0", "--window-attn-skip-freq", "2", "--no-rope-freq", "2"]
    config, layers = _config(*flags), _layers(*flags)
    assert sorted(config.model.windowed_layers) == [False, True]
    assert layers.window_attn_skip_freq == [int(x) for x in config.model.windowed_layers]
    assert layers.no_rope_freq == [int(x) for x in config.model.layers_without_rope]


def test_parallel_sizes_reach_the_layers():
    layers = _layers(
        "--tensor-model-parallel-size",
        "2",
        "--sequence-parallel",
        "--context-parallel-size",
        "2",
        world=4,
    )
    assert layers.tensor_model_parallel_size == layers.context_parallel_size == 2
    assert layers.sequence_parallel is True
    assert _layers(device=GPU).use_cpu_initialization is False


@pytest.mark.parametrize("balance", ["aux_loss", "none"])
def test_experts_are_told_of_where_there_are_some(balance):
    flags = [*LLAMA, *EXPERTS, "--moe-aux-loss-coeff", "0.5" if balance != "none" else "0.0"]
    flags += ["--moe-router-load-balancing-type", balance, "--moe-router-topk", "2"]
    layers = _layers(*flags)
    assert layers.num_moe_experts == 4 and layers.moe_ffn_hidden_size == 32
    assert layers.moe_layer_freq == [0, 1] and layers.moe_router_topk == 2
    assert layers.moe_router_load_balancing_type == balance
    assert layers.moe_aux_loss_coeff == (0.5 if balance != "none" else 0.0)
    assert layers.expert_model_parallel_size == layers.expert_tensor_parallel_size == 1


def test_a_coefficient_of_no_balance_is_none():
    config = _config(*LLAMA, *EXPERTS, "--moe-aux-loss-coeff", "0.5")
    config.model.moe_router_load_balancing_type = "none"
    assert module._experts(config)["moe_aux_loss_coeff"] == 0.0


@pytest.mark.parametrize(
    "flag", ["--swiglu", "--geglu", "--relu", "--exact-gelu", "--squared-relu", None]
)
def test_an_activation_is_the_one_that_was_asked_for(flag):
    names = ("swiglu", "geglu", "relu", "exact_gelu", "squared_relu")
    asked = (flag or "").strip("-").replace("-", "_")
    model: Any = SimpleNamespace(**{name: name == asked for name in names})
    if flag == "--squared-relu":  # which would be compiled at its first call
        assert module._activation(model) is module.squared_relu
        return
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    expected = {
        "--swiglu": x * torch.sigmoid(x),
        "--relu": x.clamp(min=0),
        None: torch.nn.functional.gelu(x, approximate="tanh"),
    }.get(flag, torch.nn.functional.gelu(x))
    torch.testing.assert_close(module._activation(model)(x), expected)


def test_a_style_says_where_norms_are():
    assert layer_style(_config().model) == LayerStyle("pre", False, None, 4, 4, True)
    style = layer_style(_config(*LLAMA, "--qk-layernorm", "--norm-placement", "both").model)
    assert style == LayerStyle("both", False, "head", 4, 2, True)
    assert LayerStyle() == LayerStyle("pre", False, None, 0, 0, True)


@pytest.mark.parametrize(
    ("style", "module_", "params"),
    [
        (LayerStyle(), None, {}),
        (LayerStyle("post"), ResidualLayer, {"norm_behind": True, "parallel": False}),
        (LayerStyle("both"), ResidualLayer, {"norm_behind": True, "parallel": False}),
        (LayerStyle(parallel=True), ResidualLayer, {"norm_behind": False, "parallel": True}),
    ],
)
def test_a_layer_is_built_by_its_style(style, module_, params):
    spec = get_layer_spec(SparseSpecProvider(), style)
    found: Any = spec.submodules
    assert (spec.module is ResidualLayer) == (module_ is not None)
    told = {
        name: value if name == "parallel" else value is not None
        for name, value in spec.params.items()
    }
    assert told == params
    before = found.input_layernorm.__name__
    assert before == ("IdentityOp" if style.placement == "post" else "TorchNorm")
    assert found.pre_mlp_layernorm is found.input_layernorm
    mask = found.self_attention.params["attn_mask_type"].name
    assert mask == "causal"
    encoder: Any = get_layer_spec(SparseSpecProvider(), LayerStyle(causal=False)).submodules
    assert encoder.self_attention.params["attn_mask_type"].name == "padding"


def test_norms_of_queries_and_keys_and_experts_are_there_where_asked_for():
    provider = SparseSpecProvider()

    def norms(kind: str | None) -> tuple[Any, Any]:
        found: Any = get_layer_spec(provider, LayerStyle(qk_norm=kind, heads=8, groups=2))
        attention = found.submodules.self_attention.submodules
        return attention.q_layernorm, attention.k_layernorm

    assert [one.__name__ for one in norms(None)] == ["IdentityOp"] * 2
    assert [one.__name__ for one in norms("head")] == ["TorchNorm"] * 2
    assert [one.params["heads"] for one in norms("all")] == [8, 2]
    block: Any = get_block_spec(provider, 3, expert_layers=[False, True, False])
    kinds = ["MoELayer" in str(spec.submodules.mlp) for spec in block.layer_specs]
    assert kinds == [False, True, False]
    plain: Any = get_block_spec(provider, 3)
    assert len(plain.layer_specs) == 3
    assert not any("MoELayer" in str(spec.submodules.mlp) for spec in plain.layer_specs)
    assert not provider.transformer_engine and not provider.fuse_layernorm_and_linear()
    assert "MoELayer" not in str(get_layer_spec(provider).submodules.mlp)


@pytest.mark.parametrize("there", [False, True])
def test_transformer_engine_is_used_where_it_can_be_and_is_not_refused(monkeypatch, there):
    monkeypatch.setattr(module, "transformer_engine_is_there", lambda: there)
    for impl in ("auto", "local", "transformer_engine"):
        config = _config("--bf16")
        config.train.transformer_impl = impl
        if impl == "transformer_engine" and not there:
            with pytest.raises(ConfigError, match="transformer_impl transformer_engine: "):
                spec_provider(config, GPU)
            continue
        assert spec_provider(config, GPU).transformer_engine == (there and impl != "local")


class _Output(module.ColumnParallelLinear):  # type: ignore[misc]
    """An output layer of 12 tokens whose logits are its input."""

    def __init__(self, output_size: int = 12) -> None:
        torch.nn.Module.__init__(self)
        self.output_size, self.weight = output_size, None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x, None


@pytest.mark.parametrize("vocab", [None, 9, 12])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tokens_that_only_pad_have_no_part_in_the_softmax(vocab, tp):
    whole = torch.randn(2, 3, 12)
    expected = whole.clone()
    lowest = torch.finfo(torch.float32).min
    expected[..., vocab if vocab is not None else 12 :] = lowest
    for rank in range(tp):
        model = torch.nn.Sequential(_Output())
        module.hide_padding(model, SimpleNamespace(tp_rank=rank), vocab)  # type: ignore[arg-type]
        here = slice(rank * 12 // tp, (rank + 1) * 12 // tp)
        x = whole[..., here].clone().requires_grad_()
        (logits, _) = model(x * 1.0)
        assert torch.equal(logits, expected[..., here])
    # All of them on one rank, whichever that is.
    model = torch.nn.Sequential(_Output())
    module.hide_padding(model, SimpleNamespace(tp_rank=1), vocab)  # type: ignore[arg-type]
    assert torch.equal(model(whole.clone())[0], expected)


def test_norms_that_heads_share_have_gradients_in_part():
    for tp in (1, 2):
        attention = torch.nn.Module()
        attention.q_layernorm, attention.k_layernorm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
        attention.other = torch.nn.LayerNorm(4)
        attention.k_layernorm.bias.tensor_model_parallel = True  # type: ignore[attr-defined]
        module._mark_partial_gradients(attention, SimpleNamespace(tp_size=tp))  # type: ignore
        marks = {n: getattr(p, "sequence_parallel", None) for n, p in attention.named_parameters()}
        assert marks == {
            "q_layernorm.weight": tp > 1,
            "q_layernorm.bias": tp > 1,
            "k_layernorm.weight": tp > 1,
            "k_layernorm.bias": None,
            "other.weight": None,
            "other.bias": None,
        }


def test_rows_of_a_vocabulary_are_marked_once():
    model = torch.nn.Sequential(_Output(), _Output(), _Output(), torch.nn.Linear(2, 2))
    for layer in model[:2]:
        layer.weight = torch.nn.Parameter(torch.zeros(12, 2))
    model[1].weight.tensor_model_parallel = True
    module._mark_vocabulary_shards(model)
    weight = model[0].weight
    assert weight.tensor_model_parallel is True
    assert (weight.partition_dim, weight.partition_stride) == (0, 1)
    assert not hasattr(model[1].weight, "partition_dim")
    assert not hasattr(model[3].weight, "partition_dim")
