"""FP8 MLPs computed as one equal their three parts, on one rank and on two, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests import dist

S, B, H, F = 8, 4, 128, 256
MODEL = [
    "--num-layers", "1", "--hidden-size", str(H), "--ffn-hidden-size", str(F),
    "--num-attention-heads", "4", "--seq-length", "32", "--position-embedding-type", "rope",
    "--normalization", "RMSNorm", "--vocab-size", "128", "--mock-data", "--bf16",
    "--train-iters", "10", "--sparsity-recipe", "fst", "--dense-tail-fraction", "0",
]  # fmt: skip


def _mlp(world, flags, fused, patterns=None, **options):
    """The MLP of a layer, made sparse in FP8 (not of a run: that would ask for a GPU)."""
    from megatron.core.transformer.mlp import MLP

    from megasparse.config import load_config, resolve
    from megasparse.fp8.delayed import DelayedScaling
    from megasparse.megatron.blocks import mlp
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.init import initialize_weights
    from megasparse.megatron.sparsify import sparsify
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.run_recipe import recipe_of
    from tools.bench.parts.single_layer import build_layer

    device = torch.device("cpu")
    config = resolve(load_config([*MODEL, *flags]), world)
    grid = make_grid(world, device, seed=1)
    model, layer = build_layer(config, device)
    initialize_weights(model, 3, 0.05, 1, grid.tp_rank, grid.tp_size)
    scales = DelayedScaling(device, reduce_max=grid.max_over_tp)
    clock = Clock(seed=5, train_iters=10)
    recipe = recipe_of(config)
    if patterns is not None:
        recipe = dataclasses.replace(recipe, sparse_layers=patterns)
    controller = sparsify(model, recipe, clock, grid.sum_over_tp, fp8=scales, **options)
    if not fused and isinstance(layer.mlp, mlp.Fp8MLP):
        layer.mlp.__class__ = MLP
    return layer.mlp, controller, clock, scales


def _steps(rank, world, flags, fused):
    """Three steps: outputs, gradients and scales, and how the MLP was computed."""
    mlp, controller, clock, scales = _mlp(world, flags, fused)
    found = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, dz = (torch.randn(S, B, H, generator=generator).bfloat16() for _ in range(2))
        if "--sequence-parallel" in flags:
            x, dz = (t.chunk(world)[rank].contiguous() for t in (x, dz))
        x.requires_grad_()
        z, bias = mlp(x)
        z.backward(dz)
        assert bias is None
        found += [z.detach(), x.grad, *(p.grad for p in mlp.parameters()), scales.history.clone()]
        mlp.zero_grad()
        controller.finish_step()
        clock.step += 1
    return type(mlp).__name__, found


TWO = ["--tensor-model-parallel-size", "2"]


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ["--swiglu"]),
        (1, ["--geglu"]),
        (1, []),
        (1, ["--swiglu", "--sparse-layers", "*.linear_fc2"]),
        (1, ["--swiglu", "--sparsity-recipe", "dense", "--dense-tail-fraction", "none"]),
        (2, [*TWO, "--swiglu"]),
        (2, [*TWO, "--sequence-parallel"]),
    ],
    ids=["swiglu", "geglu", "gelu", "fc1 dense", "dense", "tp", "tp-sp gelu"],
)
def test_the_same_bits(world, flags):
    flags = [*flags, "--disable-bias-linear"]
    ours, theirs = (dist.run(_steps, world, flags, fused) for fused in (True, False))
    for (name, found), (other, expected) in zip(ours, theirs, strict=True):
        assert (name, other) == ("Fp8MLP", "MLP")
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and b.any()


def _kinds(rank, world):
    """Which MLPs are computed as one; and that a hook on a linear sees its input."""
    plain = ["--disable-bias-linear", "--swiglu"]
    wanda = [*plain, "--sparsity-recipe", "ast", "--mask-metric", "wanda"]
    kinds = {
        "plain": _mlp(world, plain, True),
        "biases": _mlp(world, ["--swiglu"], True),
        "relu": _mlp(world, ["--disable-bias-linear", "--relu"], True),
        "slorb": _mlp(world, plain, True, slorb_k=64),
        "wanda": _mlp(world, wanda, True),
        "fc1 alone": _mlp(world, plain, True, ("*.linear_fc1",)),
    }
    names = {kind: type(mlp).__name__ for kind, (mlp, *_) in kinds.items()}
    mlp = kinds["plain"][0]
    x = torch.randn(S, B, H, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, seen = mlp(x)[0], []
    handle = mlp.linear_fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    watched = mlp(x)[0]
    handle.remove()
    return names, [tuple(t.shape) for t in seen], torch.equal(watched, expected)


def test_what_wants_more_than_the_gemms_is_computed_one_by_one():
    ((names, shapes, same),) = dist.run(_kinds, 1)
    assert names.pop("plain") == names.pop("fc1 alone") == "Fp8MLP"
    assert set(names.values()) == {"MLP"}
    assert shapes == [(S, B, F)] and same


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "watched", ["", "linear_fc1 before", "linear_fc1 after", "linear_fc2 before"]
)
def test_which_way_an_mlp_is_computed(monkeypatch, watched, scaled, biased):
    """As one, unless someone looks at its linears or scales its tokens; what each part is given."""
    from megasparse.megatron.blocks import mlp as module

    parts: dict[str, Any] = {}
    for number, name in enumerate(("linear_fc1", "linear_fc2"), 1):
        linear: Any = torch.nn.Module()
        linear.weight, linear.bias, linear.comm = f"w{number}", f"b{number}", f"comm{number}"
        linear.current_gemms = lambda number=number: (f"gemms{number}", number)
        linear.bias_of_gemm = lambda: "bias" if biased else None
        linear.finish = lambda z: (z, "finished")
        parts[name] = linear
    if watched:
        linear, when = parts[watched.split()[0]], watched.split()[1]
        hook = (
            linear.register_forward_pre_hook if when == "before" else linear.register_forward_hook
        )
        hook(lambda *_: None)
    mlp: Any = module.Fp8MLP.__new__(module.Fp8MLP)
    torch.nn.Module.__init__(mlp)
    for name, linear in parts.items():
        setattr(mlp, name, linear)
    mlp.kernel_activation = "geglu"
    monkeypatch.setattr(module, "feed_forward", lambda *given: given)
    monkeypatch.setattr(module.MLP, "forward", lambda self, *given, **more: (given, more))
    found = mlp("x", "scale" if scaled else None, more=3)
    if scaled or watched:
        assert found == (("x", "scale" if scaled else None), {"more": 3})
        return
    bias = "bias" if biased else None
    both = (("w1", "w2"), ("gemms1", "gemms2"), "comm1", (1, 2), "geglu", ("b1", bias))
    assert found == (("x", *both), None if biased else "finished")
