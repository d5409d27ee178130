"""Transformer layers whose norms leave in FP8 equal those whose norms do not, bit for bit."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megasparse.config import load_config, resolve
from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling
from megasparse.megatron.blocks import norms
from megasparse.megatron.grid import make_grid
from megasparse.megatron.init import initialize_weights
from megasparse.megatron.sparsify import sparsify
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.run_recipe import recipe_of
from tests import dist
from tools.bench.parts.single_layer import build_layer, rotary_frequencies

S, B, H, F = 32, 2, 256, 256
MODEL = [
    "--num-layers", "1", "--hidden-size", str(H), "--ffn-hidden-size", str(F),
    "--num-attention-heads", "4", "--seq-length", str(S), "--position-embedding-type", "rope",
    "--vocab-size", "128", "--mock-data", "--bf16", "--train-iters", "10",
    "--sparsity-recipe", "fst", "--dense-tail-fraction", "0",
]  # fmt: skip
LLAMA = ["--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"]
GPT = ["--normalization", "LayerNorm"]
TWO = ["--tensor-model-parallel-size", "2"]
LINEARS = ("*.mlp.*", "*.self_attention.linear_*")


def _layer(world, flags, patterns=LINEARS, current=False, **options):
    """A layer, made sparse in FP8 (not of a run: that would ask for a GPU)."""
    device = torch.device("cpu")
    config = resolve(load_config([*MODEL, *flags]), world)
    grid = make_grid(world, device, seed=1)
    model, layer = build_layer(config, device)
    initialize_weights(model, 3, 0.05, 1, grid.tp_rank, grid.tp_size)
    names = [name for name, _ in model.named_parameters()]
    if current:
        scales = CurrentScaling(grid.max_over_tp)
    else:
        scales = DelayedScaling(device, reduce_max=grid.max_over_tp)
    clock = Clock(seed=5, train_iters=10)
    recipe = dataclasses.replace(recipe_of(config), sparse_layers=tuple(patterns))
    controller = sparsify(model, recipe, clock, grid.sum_over_tp, fp8=scales, **options)
    assert options or names == [name for name, _ in model.named_parameters()]
    return layer, controller, clock, scales


def _norms(layer):
    return layer.input_layernorm, layer.pre_mlp_layernorm


def _fused(layer):
    return [isinstance(norm, norms.NormToFloat8) for norm in _norms(layer)]


def _unfuse(layer):
    for norm in _norms(layer):
        norm.__class__ = type(norm).__mro__[2]
    assert [type(norm).__module__.split(".")[0] for norm in _norms(layer)] == ["torch", "torch"]


def _input(step):
    generator = torch.Generator().manual_seed(step)
    x, dz = (torch.randn(S, B, H, generator=generator).bfloat16() for _ in range(2))
    return x.requires_grad_(), dz


def _run(layer, x):
    angles = rotary_frequencies(S, H // 4, x.device)
    return layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)[0]


def _steps(rank, world, flags, fused, recomputed, current):
    """Three steps: how often a norm has left in FP8 by the end of each; and by name all results."""
    layer, controller, clock, scales = _layer(world, flags, current=current)
    if not fused:
        _unfuse(layer)
    calls, found = [], {}
    with mock.patch.object(norms, "norm_to_float8", side_effect=norms.norm_to_float8) as called:
        for step in range(3):
            x, dz = _input(step)
            if recomputed:
                z = checkpoint(lambda x: _run(layer, x), x, use_reentrant=True)
            else:
                z = _run(layer, x)
            z.backward(dz)
            results = {"z": z.detach(), "dx": x.grad}
            if not current:
                results["history"] = scales.history.clone()
            results |= {name: p.grad for name, p in layer.named_parameters()}
            layer.zero_grad()
            controller.finish_step()
            clock.step += 1
            with torch.no_grad():
                results["evaluated"] = _run(layer.eval(), x)
            layer.train()
            calls.append(called.call_count)
            found |= {f"{name} {step}": value for name, value in results.items()}
    return calls, found


def _both(rank, world, flags, recomputed=False, current=False):
    """Counts of either way, and what differs between them."""
    ours, found = _steps(rank, world, flags, True, recomputed, current)
    theirs, expected = _steps(rank, world, flags, False, False, current)
    assert found.keys() == expected.keys() and all(t.any() for t in expected.values())
    differ = [name for name in found if not torch.equal(found[name], expected[name])]
    return ours, theirs, differ


@pytest.mark.parametrize(
    ("world", "flags"), [(1, LLAMA), (1, GPT), (2, [*LLAMA, *TWO])], ids=["llama", "gpt", "tp"]
)
def test_the_same_bits(world, flags):
    for ours, theirs, differ in dist.run(_both, world, flags):
        assert (ours, theirs, differ) == ([4, 8, 12], [0, 0, 0], [])


def test_the_same_bits_with_current_scaling():
    for ours, theirs, differ in dist.run(_both, 2, [*LLAMA, *TWO], False, True):
        assert (ours, theirs, differ) == ([4, 8, 12], [0, 0, 0], [])


def test_a_recomputed_layer_is_the_same():
    (found,) = dist.run(_both, 1, LLAMA, True)
    assert found == ([6, 12, 18], [0, 0, 0], [])


def _kinds(rank, world):
    """Which norms leave in FP8, by what is behind them."""
    wanda = [*LLAMA, "--sparsity-recipe", "ast", "--mask-metric", "wanda"]
    return {
        "all": _fused(_layer(1, LLAMA)[0]),
        "mlp": _fused(_layer(1, LLAMA, ("*.mlp.*",))[0]),
        "fc2": _fused(_layer(1, LLAMA, ("*.mlp.linear_fc2",))[0]),
        "fc1": _fused(_layer(1, LLAMA, ("*.mlp.linear_fc1",))[0]),
        "slorb": _fused(_layer(1, LLAMA, slorb_k=64)[0]),
        "wanda": _fused(_layer(1, wanda)[0]),
        "current scaling": _fused(_layer(1, LLAMA, current=True)[0]),
    }


def test_what_wants_more_than_the_gemms_keeps_its_norm():
    (kinds,) = dist.run(_kinds, 1)
    assert kinds == {
        "all": [True, True],
        # What is not sparse is in FP8 too.
        "mlp": [True, True],
        "fc2": [True, True],
        "fc1": [True, True],
        "slorb": [False, False],
        "wanda": [False, False],
        "current scaling": [True, True],
    }


def _with_sequence_parallelism(rank, world):
    flags = [*LLAMA, *TWO, "--sequence-parallel"]
    return [_fused(_layer(world, flags, current=current)[0]) for current in (False, True)]


def test_what_is_gathered_leaves_the_norm_in_8_bits_too():
    """A current scale is that of all that is gathered: no rank knows it before."""
    assert dist.run(_with_sequence_parallelism, 2) == [[[True, True], [False, False]]] * 2


def _hooks(rank, world):
    """What hooks see, at each place that may look at a norm's output."""
    layer, controller, clock, _ = _layer(1, LLAMA)
    x, dz = _input(0)
    _run(layer, x).backward(dz)
    controller.finish_step()
    clock.step += 1
    expected, seen = _run(layer, x).detach(), []

    def note(*arguments):
        seen.append(arguments[1][0])

    def note_output(module, inputs, output):
        seen.append(output)

    attention, mlp = layer.self_attention, layer.mlp
    for register, hook in (
        (layer.input_layernorm.register_forward_hook, note_output),
        (layer.pre_mlp_layernorm.register_forward_hook, note_output),
        (attention.register_forward_pre_hook, note),
        (attention.linear_qkv.register_forward_pre_hook, note),
        (mlp.register_forward_pre_hook, note),
        (mlp.linear_fc1.register_forward_pre_hook, note),
        (mlp.linear_fc2.register_forward_pre_hook, note),
        (attention.linear_qkv.register_full_backward_hook, note),
    ):
        handle = register(hook)
        z = _run(layer, x)
        z.backward(dz)
        handle.remove()
        assert torch.equal(z, expected), register
    return [(type(t).__name__, tuple(t.shape), t.dtype) for t in seen]


def test_hooks_see_tensors():
    (seen,) = dist.run(_hooks, 1)
    whole = ("Tensor", (S, B, H), torch.bfloat16)
    assert seen == [*[whole] * 6, ("Tensor", (S, B, F), torch.bfloat16), whole]
