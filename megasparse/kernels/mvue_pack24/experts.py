"""`mvue_pack24` of the tokens of experts: each expert's packed draw, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.errors import KernelError
from megasparse.kernels.checks import require, set_flag
from megasparse.kernels.dispatch import implementation
from megasparse.kernels.mvue24.reference import mvue24
from megasparse.kernels.mvue_pack24 import Channels, check_channels, triton
from megasparse.kernels.pack24.reference import pack24
from megasparse.kernels.packed24 import (
    COLUMN_MULTIPLE,
    Packed24,
    empty_packed,
    parts_of,
    unit_scale,
)
from megasparse.kernels.random import SeedLike, check_seed

OP = "mvue_pack24_experts"


@torch.no_grad()
def mvue_pack24_experts(
    dz: torch.Tensor,
    counts: Sequence[int],
    groups: torch.Tensor,
    *,
    seed: SeedLike,
    channels: Channels | None = None,
    exact: bool = True,
    error_flag: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[Packed24, ...]:
    """`mvue_pack24` of tokens that are sorted by expert, with a packed part for each.

    Args:
        dz: (T, N), bfloat16 or float16, T above 0.
        counts: tokens of each expert, multiples of 64; T in all.
        groups: int64 (T / 4,), below 2^32, on dz's device: what each group of four tokens draws by,
            as in `mvue24`.
        The others are those of `mvue_pack24`.

    Returns: of each expert a Packed24 of (N, its tokens), one after the other in memory.

    Raises: as `mvue_pack24`.
    """
    channels = channels or ((0, 0, dz.shape[-1]),)
    if dz.dim() != 2 or dz.dtype not in (torch.bfloat16, torch.float16) or not dz.shape[0]:
        raise KernelError(f"{OP}: dz is {dz.dtype} {tuple(dz.shape)}, expected 16 bits, (T, N)")
    check_channels(OP, dz.shape[1], channels)
    check_seed(OP, seed, dz.device)
    check_experts(OP, dz, counts, groups, COLUMN_MULTIPLE[dz.dtype])
    require(OP, "error_flag", error_flag, torch.int32, (1,), dz.device)
    run = implementation(
        OP, dz, backend, reference=_by_definition, triton=triton.mvue_pack24_experts
    )
    return run(dz, seed, groups, counts, channels, exact, error_flag)


def check_experts(
    op: str, dz: torch.Tensor, counts: Sequence[int], groups: torch.Tensor, multiple: int
) -> None:
    """KernelError unless `counts` are all tokens in whole tiles, and groups have their numbers."""
    if sum(counts) != dz.shape[0] or any(n < 0 or n % multiple for n in counts):
        raise KernelError(
            f"{op}: {list(counts)} tokens of {dz.shape[0]}, expected all, in multiples of "
            f"{multiple}"
        )
    require(op, "groups", groups, torch.int64, (dz.shape[0] // 4,), dz.device)


def _by_definition(
    dz: torch.Tensor,
    seed: SeedLike,
    groups: torch.Tensor,
    counts: Sequence[int],
    channels: Channels,
    exact: bool,
    error_flag: torch.Tensor | None,
) -> tuple[Packed24, ...]:
    drawn = torch.cat(
        [
            mvue24(dz[:, start : start + n], seed, 0, (0, place), exact, False, groups)
            for start, place, n in channels
        ],
        1,
    )
    scale = unit_scale(dz.device)
    whole = empty_packed((dz.shape[1], dz.shape[0]), dz.dtype, scale, dz.device)
    packed = parts_of(whole, counts)
    for one, part in zip(packed, drawn.t().split(list(counts), 1), strict=True):
        if part.shape[1]:
            found, crowded = pack24(part, dz.dtype, scale)
            one.copy_(found)
            set_flag(error_flag, crowded)
    return packed
