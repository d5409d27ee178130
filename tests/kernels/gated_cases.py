"""Projections [gate | x] and gradients for the tests of the operations that fuse a SwiGLU."""

from __future__ import annotations

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [(128, 64, BF16), (384, 192, FP16), (131, 128, BF16), (3, 64, BF16)]


def numbers(tokens, width, device, dtype, number=0):
    generator = torch.Generator().manual_seed(tokens + width + number)
    x = torch.randn(tokens, width, generator=generator)
    return (x * torch.randn(tokens, width, generator=generator).exp()).to(dtype).to(device)


def projection(tokens, width, device, dtype, exact):
    """[gate | x]; with `exact` gates whose sigmoid is 1 in float32: the same by every formula."""
    fused = numbers(tokens, 2 * width, device, dtype)
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
