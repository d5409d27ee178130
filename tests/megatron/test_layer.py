"""One Transformer layer as GPUs run it."""

from __future__ import annotations

import pytest
import torch

from megasparse.config import load_config, resolve
from tests import dist
from tests.transformer_engine import needs_transformer_engine

FLAGS = [
    "--num-layers", "1", "--hidden-size", "512", "--ffn-hidden-size", "1024",
    "--num-attention-heads", "4", "--group-query-attention", "--num-query-groups", "2",
    "--seq-length", "256", "--position-embedding-type", "rope", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--vocab-size", "512", "--mock-data",
    "--train-iters", "10", "--micro-batch-size", "2", "--global-batch-size", "2",
]  # fmt: skip


@pytest.fixture
def one_rank(device, monkeypatch):
    """Process groups of one rank."""
    from megasparse.megatron.grid import make_grid
    from megasparse.train.engine.deepspeed import start_process, stop_process

    own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (own | {"MASTER_PORT": str(dist.free_port())}).items():
        monkeypatch.setenv(name, value)
    make_grid(1, start_process(10.0), 1)
    yield
    stop_process()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        ["--sparsity-recipe", "fst"],
        ["--sparsity-recipe", "fst", "--fp8-format", "e4m3"],
        ["--sparsity-recipe", "s_ste", "--fp8-format", "hybrid"],
    ],
)
def test_micro_batches_do_not_wait_for_the_device(device, one_rank, flags):
    """Two micro-batches, with refreshed masks and prepared weights in the first."""
    if "--fp8-format" in flags:
        needs_transformer_engine(device)
    from megasparse.fp8.delayed import DelayedScaling
    from megasparse.megatron.sparsify import sparsify
    from megasparse.sparsity.clock import Clock
    from megasparse.sparsity.run_recipe import recipe_of
    from tools.bench.parts.single_layer import build_layer, rotary_frequencies

    everything = ["--sparse-layers", "*.mlp.*", "*.self_attention.linear_*"]
    config = resolve(
        load_config([*FLAGS, "--bf16", *everything, *flags, "--dense-tail-fraction", "0"]), 1
    )
    model, layer = build_layer(config, device)
    scales = DelayedScaling(device) if config.fp8.fp8_format else None
    clock = Clock(1, 10)
    controller = sparsify(model, recipe_of(config), clock, fp8=scales)
    angles = rotary_frequencies(256, 128, device)
    x = torch.randn(256, 2, 512, device=device).bfloat16().requires_grad_()
    for step in range(3):
        torch.cuda.synchronize()
        # Kernels are compiled, algorithms searched and first scales found in the first step.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            for _ in range(2):
                z = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)[0]
                z.backward(torch.ones_like(z))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        controller.finish_step()
        clock.step += 1


@pytest.mark.parametrize("groups", [2, 4])
def test_rotated_projection_is_the_rotated_parts(device, one_rank, groups):
    """Queries, keys and values rotated out of the projection's output, and taken from it first."""
    from megatron.core.transformer.attention import SelfAttention

    from megasparse.megatron.blocks.attention import RotaryQkvAttention
    from tools.bench.parts.single_layer import build_layer, rotary_frequencies

    precision = ["--bf16"] if device.type == "cuda" else ["--no-bf16"]
    config = resolve(load_config([*FLAGS, *precision, "--num-query-groups", str(groups)]), 1)
    _, layer = build_layer(config, device)
    dtype = next(layer.parameters()).dtype
    angles = rotary_frequencies(256, 128, device)
    generator = torch.Generator(device).manual_seed(3)
    x, dz = (torch.randn(256, 2, 512, generator=generator, device=device) for _ in range(2))
    x = x.to(dtype).requires_grad_()
    found = []
    for kind in (RotaryQkvAttention, SelfAttention):
        layer.self_attention.__class__ = kind
        layer.zero_grad()
        x.grad = None
        z = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)[0]
        z.backward(dz.to(dtype))
        found.append([z.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for ours, expected in zip(*found, strict=True):
        error = (ours.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6), error
