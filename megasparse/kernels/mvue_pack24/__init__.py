"""The weight gradient's sparse operand in one pass: MVUE along tokens, transpose, pack."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import require, set_flag
from megasparse.kernels.mvue24.places import FIRST, Places, check_places
from megasparse.kernels.mvue_pack24 import reference, triton
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, E4M3, ROW_MULTIPLE, Packed24
from megasparse.kernels.random import SeedLike, check_seed

# Sections of channels: (first local channel, its place in the whole layer, number of channels).
Channels = tuple[tuple[int, int, int], ...]


@torch.no_grad()
def mvue_pack24(
    dz: torch.Tensor,
    *,
    seed: SeedLike,
    channels: Channels | None = None,
    tokens: Places = FIRST,
    exact: bool = True,
    strided: bool = False,
    error_flag: torch.Tensor | None = None,
    backend: str | None = None,
) -> Packed24:
    """`pack24(mvue24(dz, dim=0).t())`: dZ^T (N, T), 2:4 along tokens, packed.

    Args:
        dz: (T, N) output gradient, bfloat16 or float16, row-major; N a multiple of 64, any T
            (tokens of zeros fill it up to a multiple of 64).
        seed: int of at most 64 bits, or an int64 tensor, 0-d or (1,), on dz's device; as `mvue24`.
        channels: where the channels lie in the whole layer, in sections whose sizes are multiples
            of 64; by default they are the layer's first.
        tokens: where the tokens lie among those that draws are counted over, in one or two runs
            (`mvue24/places.py`); by default they are the first.
        exact: the exact sampler, or the papers' approximation.
        strided: groups of tokens a quarter of all (zeros included) apart; columns are in the order
            of groups, which the other operand must have too (`token_order.by_groups`).
        error_flag: int32 (1,) on dz's device, set when a group has more than two non-zeros (which
            only infinities and NaN can cause).
        backend: None, "reference" or "triton".

    Returns: Packed24 of shape (N, T up to a multiple of 64).

    Raises: KernelError on sizes, dtypes, or a backend that cannot run.
    """
    if dz.dim() != 2 or dz.dtype == E4M3 or dz.dtype not in COLUMN_MULTIPLE or not dz.shape[0]:
        raise KernelError(
            f"mvue_pack24: dz is {dz.dtype} of shape {tuple(dz.shape)}, expected 16 bits, (T, N)"
        )
    channels = channels or ((0, 0, dz.shape[1]),)
    check_channels("mvue_pack24", dz.shape[1], channels)
    check_places("mvue_pack24", tokens, strided)
    check_seed("mvue_pack24", seed, dz.device)
    require("mvue_pack24", "error_flag", error_flag, torch.int32, (1,), dz.device)
    run = dispatch.implementation(
        "mvue_pack24", dz, backend, reference=_by_definition, triton=triton.mvue_pack24
    )
    return run(dz, seed, channels, tokens, exact, strided, error_flag)


def check_channels(op: str, width: int, channels: Channels) -> None:
    """KernelError unless the sections are all of `width` channels, in multiples of 64."""
    if sum(length for *_, length in channels) != width:
        raise KernelError(f"{op}: sections {channels} of channels, expected all {width}")
    if any(start % ROW_MULTIPLE or length % ROW_MULTIPLE for start, _, length in channels):
        raise KernelError(f"{op}: sections {channels}, expected multiples of {ROW_MULTIPLE}")


def _by_definition(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: Channels,
    tokens: Places,
    exact: bool,
    strided: bool,
    error_flag: torch.Tensor | None,
) -> Packed24:
    packed, crowded = reference.mvue_pack24(dz, seed, channels, tokens, exact, strided)
    set_flag(error_flag, crowded)
    return packed
