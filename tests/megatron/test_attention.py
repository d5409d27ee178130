"""Attention, norms and gated activations from torch, against what they are by definition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megasparse.megatron.blocks import qk_norm
from megasparse.megatron.blocks import torch_modules as module
from megasparse.megatron.blocks.qk_norm import AllHeadsRMSNorm
from megasparse.megatron.blocks.torch_modules import (
    GatedActivation,
    SdpaAttention,
    TorchNorm,
    within_window,
)

DROPOUT = 0.25


def _attention(window=None, kind=AttnMaskType.causal, **more: Any) -> Any:
    config = SimpleNamespace(
        attention_dropout=DROPOUT,
        sequence_parallel=False,
        window_size=window,
        window_attn_skip_freq=None,
    )
    return SdpaAttention(config, 1, kind, "self", **more).eval()


def _reference(q, k, v, allowed, scale) -> torch.Tensor:
    repeats = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeats, 2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, v).flatten(2)


@pytest.mark.parametrize("queries", [9, 4, 1])
@pytest.mark.parametrize("window", [None, 3, 9, 20])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_query_sees_what_is_before_it_within_its_window(queries, window, groups):
    """Fewer queries than keys are the last ones, as in decoding."""
    keys = 9
    if window is None and 1 < queries < keys:
        return  # megatron-core decodes one at a time
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, 2, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(keys, 2, groups, 8, generator=generator, dtype=torch.float64) for _ in "kv")
    # Megatron's pair counts the tokens before a query's own.
    attention = _attention(None if window is None else (window - 1, 0))
    assert attention.window == window
    places = torch.arange(keys - queries, keys)[:, None]
    back = places - torch.arange(keys)
    allowed = (back >= 0) & (back < (window or keys))
    if queries == keys or queries == 1 or (window or keys) < keys:
        torch.testing.assert_close(attention(q, k, v, None), _reference(q, k, v, allowed, 8**-0.5))
    forbidden = torch.rand(2, 1, queries, keys, generator=generator) < 0.2
    forbidden[..., 0] = forbidden[..., -1] = False
    found = attention(q, k, v, forbidden)
    near = back < window if window is not None and window < keys else back < keys
    near = near & ((back >= 0) if window is not None and window < keys else (back < keys))
    torch.testing.assert_close(found, _reference(q, k, v, ~forbidden & near, 8**-0.5))


def test_an_encoder_sees_everything_and_the_scale_is_the_given_one():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 1, 2, 8, generator=generator, dtype=torch.float64) for _ in "qkv")
    attention = _attention(kind=AttnMaskType.padding, softmax_scale=0.5)
    allowed = torch.ones(6, 6, dtype=torch.bool)
    torch.testing.assert_close(attention(q, k, v, None), _reference(q, k, v, allowed, 0.5))


def test_dropout_is_that_of_the_configuration_unless_given():
    assert _attention().dropout == DROPOUT
    assert _attention(attention_dropout=0.0).dropout == 0.0
    assert _attention().cp_group is None


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_window_holds_its_number_of_keys(window):
    places = torch.tensor([0, 2, 6])
    near = within_window(places, 7, window)
    for row, place in zip(near.tolist(), places.tolist(), strict=True):
        assert [n for n, seen in enumerate(row) if seen] == list(
            range(max(0, place - window + 1), place + 1)
        )


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms_are_torchs_with_marks_for_their_gradients(kind, split):
    config = SimpleNamespace(
        normalization=kind, params_dtype=torch.bfloat16, sequence_parallel=split
    )
    norm = TorchNorm(config, 8, eps=1e-3)
    assert type(norm).__name__ == kind and norm.eps == 1e-3
    assert TorchNorm(config, 8).eps == 1e-5
    for parameter in norm.parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.sequence_parallel is split
    assert len(list(norm.parameters())) == (1 if kind == "RMSNorm" else 2)


@pytest.mark.parametrize("gelu", [False, True])
def test_a_gated_activation_is_gate_times_up(gelu):
    function = torch.nn.functional.gelu if gelu else torch.nn.functional.silu
    activation = GatedActivation(SimpleNamespace(activation_func=function))
    assert activation.gelu is gelu and activation.sharded_state_dict() == {}
    fused = torch.randn(3, 2, 8)
    gate, up = fused.chunk(2, -1)
    gated = module.gelu_tanh(gate) if gelu else torch.nn.functional.silu(gate)
    torch.testing.assert_close(activation(fused), gated * up)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_norm_over_all_heads_takes_its_mean_over_those_of_all_ranks(monkeypatch, ranks):
    x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.nn.functional.rms_norm(x.flatten(2), (32,), eps=1e-3).view(x.shape)
    total = x.float().square().sum((-2, -1), keepdim=True)
    monkeypatch.setattr(
        qk_norm,
        "mappings",
        SimpleNamespace(
            reduce_from_tensor_model_parallel_region=lambda part: total,
            copy_to_tensor_model_parallel_region=lambda whole: whole,
        ),
    )
    config: Any = SimpleNamespace(tensor_model_parallel_size=ranks, params_dtype=torch.float32)
    for rank in range(ranks):
        norm = AllHeadsRMSNorm(8, config, 1e-3, 4)
        weight: Any = norm.weight
        assert weight.tensor_model_parallel is True and weight.shape == (32 // ranks,)
        assert (weight.partition_dim, weight.partition_stride) == (0, 1)
        with torch.no_grad():
            weight.mul_(2)
        here = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        found = norm(x[:, :, here])
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, 2 * expected[:, :, here], rtol=1e-5, atol=1e-6)
