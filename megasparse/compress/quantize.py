"""Weights in 4 bits or FP8 that keep their zeros, and the packing of 2:4 ones.

Both formats are symmetric, so zero is zero:

    int4   q in [-7, 7], one float16 scale for every `group_size` inputs of a row
    fp8    e4m3, one float32 scale a row

A 2:4 weight stores two of every four values and their two-bit places: 3 bits a weight in int4 and 5
in FP8, and the scales. (torchao 0.18 quantizes `torch.nn.Linear` modules, its AWQ as well, and
packs 2:4 in FP8 alone; these layers are no such modules, and on matrices it is a few lines.)

Activation-aware scaling (AWQ, Lin et al., MLSys 2024): with inputs divided by s and columns of W
multiplied by it the layer is the same, and Q(W s) / s is more exact where inputs are large.
s_j = mean|x_j|^alpha, alpha from a grid, by the error on the calibration inputs:

    || X W^T - X (Q(W s) / s)^T ||^2 = tr(D G D^T),   D = W - Q(W s) / s,   G = X^T X
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megasparse.errors import ConfigError

FORMATS = ("int4", "fp8")
_LARGEST = 7
GRID = tuple(step / 20 for step in range(20))


@dataclass(frozen=True)
class Quantized:
    """A weight `(N, K)` in few bits.

    Attributes:
        values: int8 codes, or float8_e4m3fn; `(N, K)`.
        scales: `(N, K / group)` float16, or `(N, 1)` float32.
        mask: bool `(N, K)`, exactly two of four; None for a dense weight.
    """

    values: torch.Tensor
    scales: torch.Tensor
    mask: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """`(N, K)` float32."""
        groups = self.scales.shape[1]
        grouped = self.values.float().unflatten(1, (groups, -1))
        return (grouped * self.scales.float().unsqueeze(-1)).flatten(1)

    def pack(self) -> dict[str, torch.Tensor]:
        """What is stored: values (int4: two a byte), scales, and for 2:4 the places (four a
        byte)."""
        values, stored = self.values, {"scales": self.scales}
        if self.mask is not None:
            places = self.mask.unflatten(1, (-1, 4)).nonzero()[:, 2].view(values.shape[0], -1)
            stored["places"] = _pack_bits(places.to(torch.uint8), 2)
            values = values[self.mask].view(values.shape[0], -1)
        if values.dtype == torch.int8:
            values = _pack_bits((values & 15).view(torch.uint8), 4)
        stored["values"] = values
        return stored

    @classmethod
    def unpack(cls, stored: dict[str, torch.Tensor], columns: int) -> Quantized:
        """The inverse of `pack` for a weight of `columns` inputs."""
        values, scales = stored["values"], stored["scales"]
        if values.dtype == torch.uint8:
            codes = _unpack_bits(values, 4).view(torch.int8)
            values = torch.where(codes > 7, codes - 16, codes)
        if "places" not in stored:
            return cls(values, scales)
        rows = values.shape[0]
        places = _unpack_bits(stored["places"], 2).long()
        places += torch.arange(columns // 4).repeat_interleave(2) * 4
        mask = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, places, True)
        bits = torch.zeros(rows, columns, dtype=torch.int8)
        bits.scatter_(1, places, values.view(torch.int8))
        return cls(bits.view(values.dtype), scales, mask)


def quantize(
    weight: torch.Tensor, kind: str, group_size: int = 128, mask: torch.Tensor | None = None
) -> Quantized:
    """The nearest codes: `round(w / scale)`, scale the group's largest magnitude / 7 (int4) or the
    row's / 448 (fp8).

    Args:
        weight: `(N, K)` of any float dtype; zero where `mask` is False.
        kind: one of FORMATS.
        group_size: inputs that share a scale in int4; fp8 has one scale a row.
        mask: bool `(N, K)` of a 2:4 weight; kept, not applied.

    Returns:
        Codes and scales on the weight's device, outside autograd.

    Raises:
        ConfigError: the group size does not divide K.
    """
    w = weight.detach().float()
    if kind == "fp8":
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales = (w.abs().amax(1, keepdim=True) / largest).clamp(min=torch.finfo(w.dtype).tiny)
        return Quantized((w / scales).to(torch.float8_e4m3fn), scales, mask)
    if w.shape[1] % group_size:
        raise ConfigError(f"group_size {group_size} does not divide {w.shape[1]} inputs")
    grouped = w.unflatten(1, (-1, group_size))
    # Rounded as it is stored, so that what is stored is nearest.
    scales = (grouped.abs().amax(-1) / _LARGEST).half()
    step = scales.float().clamp(min=2.0**-24).unsqueeze(-1)
    codes = (grouped / step).round().clamp(-_LARGEST, _LARGEST).flatten(1)
    return Quantized(codes.to(torch.int8), scales, mask)


def awq_scales(
    weight: torch.Tensor, gram: torch.Tensor, mean_abs: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, float]:
    """Best s `(K,)` float32 for int4, and its alpha; ones and 0 if nothing is better.

    Args:
        weight: `(N, K)`.
        gram: `X^T X` `(K, K)` float32.
        mean_abs: `mean |x_j|` `(K,)`.
    """
    w = weight.detach().float()
    best, best_alpha, smallest = torch.ones_like(mean_abs), 0.0, float("inf")
    for alpha in GRID:
        scales = mean_abs.float().clamp(min=1e-4).pow(alpha)
        scales = scales / (scales.max() * scales.min()).sqrt()
        difference = w - quantize(w * scales, "int4", group_size).dequantize() / scales
        error = float(((difference @ gram) * difference).sum())
        if error < smallest:
            best, best_alpha, smallest = scales, alpha, error
    return best, best_alpha


def _pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes `(N, M)` of few bits, `8 / bits` to a byte, the first in the lowest bits."""
    count = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % count))
    parts = padded.unflatten(1, (-1, count))
    packed = parts[..., 0].clone()
    for i in range(1, count):
        packed |= parts[..., i] << (bits * i)
    return packed


def _unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of `_pack_bits`; the padding of an odd length stays."""
    parts = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(parts, -1).flatten(1)
