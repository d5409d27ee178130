"""Projections and gradients for the tests of the operations that fuse an activation."""

from __future__ import annotations

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16 = torch.bfloat16, torch.float16
# Tokens, width of the activation, dtype, activation.
SHAPES = [
    (128, 64, BF16, "swiglu"),
    (384, 192, FP16, "swiglu"),
    (131, 128, BF16, "swiglu"),
    (3, 64, BF16, "swiglu"),
    (131, 128, BF16, "geglu"),
    (131, 128, BF16, "gelu"),
    (256, 192, FP16, "gelu"),
]


def numbers(tokens, width, device, dtype, number=0):
    generator = torch.Generator().manual_seed(tokens + width + number)
    x = torch.randn(tokens, width, generator=generator)
    return (x * torch.randn(tokens, width, generator=generator).exp()).to(dtype).to(device)


def projection(tokens, width, device, dtype, exact, activation="swiglu"):
    """[gate | x], for "gelu" the gate; with `exact` gates whose sigmoid is 1 in float32: the same
    by every formula."""
    fused = numbers(tokens, width if activation == "gelu" else 2 * width, device, dtype)
    if exact:
        fused[:, :width] = fused[:, :width].abs() / 8 + 20.0
    return fused


def scalar(x, device):
    return torch.tensor(float(x), device=device)


def bits(t):
    return t.contiguous().view(torch.uint8)


def same(found, expected, exact):
    """Bit for bit; or, where a sigmoid's last bit may decide, all but a few bytes."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    wrong = bits(found) != bits(expected)
    assert float(wrong.float().mean()) <= (0.0 if exact else 2e-3)


def padded(t, tokens):
    return torch.nn.functional.pad(t.float(), (0, 0, 0, -tokens % 128))
