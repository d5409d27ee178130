"""Queries, keys and values out of a fused projection, rotated by position, in one pass."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.factors import Factors, Lacking, lacking
from megasparse.kernels.rotary_qkv import reference, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Heads(NamedTuple):
    """How a position's row of the projection is divided: groups of queries, a key and a value.

    Attributes:
        groups: of heads that share a key and a value.
        queries: of a group.
        channels: of a head, even.
    """

    groups: int
    queries: int
    channels: int

    @property
    def width(self) -> int:
        """Of the projection."""
        return self.groups * (self.queries + 2) * self.channels


class _RotaryQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fused: torch.Tensor,
        angles: torch.Tensor,
        heads: Heads,
        factors: Lacking,
        chosen: ModuleType,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(angles)
        ctx.heads, ctx.chosen = heads, chosen
        return chosen.forward(fused, angles, heads, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (angles,) = ctx.saved_tensors
        return ctx.chosen.backward(*gradients, angles, ctx.heads), None, None, None, None


class _SplitQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fused: torch.Tensor, heads: Heads, chosen: ModuleType
    ) -> tuple[torch.Tensor, ...]:
        ctx.heads, ctx.chosen = heads, chosen
        return reference.split(fused, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole = _whole(gradients, ctx.heads)
        if whole is None:
            whole = ctx.chosen.backward(*gradients, None, ctx.heads)
        return whole, None, None


def _whole(parts: tuple[torch.Tensor, ...], heads: Heads) -> torch.Tensor | None:
    """The tensor (S, B, width) of which the three are views, as of a projection, if they are.

    Attention that reads q, k and v from where they lie together writes their gradients so too.
    """
    q, (length, batch) = parts[0], parts[0].shape[:2]
    width, channels = heads.width, heads.channels
    strides = (batch * width, width, 3 * channels, 1)
    for place, part in enumerate(parts):
        together = part.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
        offset = part.storage_offset() - q.storage_offset()
        if not together or part.stride() != strides or offset != place * channels:
            return None
    if heads.queries != 1:
        return None
    return q.as_strided((length, batch, width), (batch * width, width, 1))


def split_qkv(
    fused: torch.Tensor, heads: Heads, *, backend: str | None = None
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a fused projection as they are: `rotary_qkv` without angles.

    They are views of `fused` where groups have one query. The gradient of `fused` is the tensor
    that their gradients are views of in the same way, or is written whole in one pass.

    Raises: KernelError as `rotary_qkv`.
    """
    _check("split_qkv", fused, heads)
    chosen = dispatch.implementation(
        "split_qkv", fused, backend, reference=reference, triton=triton
    )
    return _SplitQkv.apply(fused, heads, chosen)


def rotary_qkv(
    fused: torch.Tensor,
    angles: torch.Tensor,
    heads: Heads,
    *,
    factors: Factors | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotary position embedding (Su et al., 2021) of a fused QKV projection, with autograd.

    Channels i and i + D/2 of a query or key at position s are turned by angle[s, i]:

        (a, b) -> (a cos - b sin, b cos + a sin)

    Arithmetic is float32, rounded once. Values are copied. The gradient of `fused` is written whole
    in one pass, so nothing is joined after.

    Args:
        fused: (S, B, groups * (queries + 2) * D), Megatron's order: the queries of a group, its
            key, its value. float32, bfloat16 or float16.
        angles: float32 (S', ..., D), S' >= S, in radians; their second half repeats the first.
        heads: groups, queries of each, D.
        factors: what `fused` lacks (`kernels/factors.py`), a power of two; None: nothing. The
            gradient is that of `fused` times them.

    Returns: q (S, B, groups * queries, D); k, v (S, B, groups, D); contiguous.

    Raises: KernelError for shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    _check("rotary_qkv", fused, heads)
    length, channels = fused.shape[0], heads.channels
    plain = angles.numel() == angles.shape[0] * channels and angles.is_contiguous()
    if (
        (angles.dtype, angles.device, plain) != (torch.float32, fused.device, True)
        or angles.shape[0] < length
        or channels % 2
    ):
        raise KernelError(
            f"rotary_qkv: angles are {angles.dtype} {tuple(angles.shape)} on {angles.device}, "
            f"expected float32 of at least {length} positions by {channels} channels, an even "
            f"number, on {fused.device}"
        )
    chosen = dispatch.implementation(
        "rotary_qkv", fused, backend, reference=reference, triton=triton
    )
    lacks = lacking("rotary_qkv", factors, fused.device)
    return _RotaryQkv.apply(fused, angles.view(-1, channels), heads, lacks, chosen)


def _check(op: str, fused: torch.Tensor, heads: Heads) -> None:
    if fused.dtype not in DTYPES or fused.dim() != 3 or fused.shape[2] != heads.width:
        raise KernelError(
            f"{op}: fused is {fused.dtype} {tuple(fused.shape)}, expected float32, bfloat16 "
            f"or float16 (S, B, {heads.width}) for {heads}"
        )
    if heads.channels % 2:
        raise KernelError(f"{op}: heads have {heads.channels} channels, expected an even number")
