"""One Transformer layer as GPUs run it."""

from __future__ import annotations

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.megatron.spec import transformer_engine_is_there
from tests import dist

FLAGS = [
    "--num-layers", "1", "--hidden-size", "512", "--ffn-hidden-size", "1024",
    "--num-attention-heads", "4", "--group-query-attention", "--num-query-groups", "2",
    "--seq-length", "256", "--position-embedding-type", "rope", "--normalization", "RMSNorm",
    "--swiglu", "--disable-bias-linear", "--vocab-size", "512", "--mock-data", "--bf16",
    "--train-iters", "10", "--micro-batch-size", "2", "--global-batch-size", "2",
]  # fmt: skip


@pytest.fixture
def one_rank(device, monkeypatch):
    """Process groups of one rank on the GPU."""
    from megasparse.megatron.grid import make_grid
    from megasparse.train.process import start_process, stop_process

    own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (own | {"MASTER_PORT": str(dist.free_port())}).items():
        monkeypatch.setenv(name, value)
    make_grid(1, start_process(10.0), 1)
    yield
    stop_process()


@pytest.mark.gpu
def test_rotated_projection_is_the_rotated_parts(device, one_rank):
    """Queries, keys and values rotated out of the projection's output, and taken from it first."""
    if not transformer_engine_is_there():
        pytest.skip("Transformer Engine is not installed")
    from megasparse.megatron.layer import build_layer, rotary_frequencies

    config = resolve(load_config(FLAGS), 1)
    _, layer = build_layer(config, device)
    assert layer.config.fused_single_qkv_rope
    angles = rotary_frequencies(256, 128, device)
    generator = torch.Generator(device).manual_seed(3)
    x = torch.randn(256, 2, 512, generator=generator, device=device).bfloat16().requires_grad_()
    dz = torch.randn(256, 2, 512, generator=generator, device=device).bfloat16()
    found = []
    for fused in (True, False):
        layer.config.fused_single_qkv_rope = fused
        layer.zero_grad()
        x.grad = None
        z = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)[0]
        z.backward(dz)
        found.append([z.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for ours, expected in zip(*found, strict=True):
        error = (ours.double() - expected.double()).norm() / expected.double().norm()
        assert error < 1e-2, error
