"""Both operands that a gradient becomes, in one pass: quantized, and sparse along tokens."""

from __future__ import annotations

import torch

from megasparse.kernels import dispatch
from megasparse.kernels.checks import require
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.grad_pack24 import reference, triton
from megasparse.kernels.grad_pack24.quantization import Quantization, check_gradient
from megasparse.kernels.mvue24.places import FIRST, Places, check_places
from megasparse.kernels.mvue_pack24 import Channels
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.random import SeedLike, check_seed


@torch.no_grad()
def grad_pack24(
    dz: torch.Tensor,
    *,
    seed: SeedLike,
    row_scale: torch.Tensor | None = None,
    row_dtype: torch.dtype | None = E5M2,
    packed_scale: torch.Tensor,
    channels: Channels | None = None,
    tokens: Places = FIRST,
    exact: bool = True,
    strided: bool = False,
    row_amax: torch.Tensor | None = None,
    packed_amax: torch.Tensor | None = None,
    error_flag: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, Packed24]:
    """dZ quantized for grad_input, and MVUE(dZ^T), 2:4 along tokens, quantized for grad_weight.

    The second is what `mvue24(dz.float(), seed=seed, dim=0).t()`, quantized to e4m3, gives to
    `pack24`: the draws are those of `mvue24`, kept values are rounded once. One that vanishes in
    e4m3 counts as zero.

    Args:
        dz: (T, N) output gradient, bfloat16 or float16, row-major (copied otherwise); N a multiple
            of 64, any T (tokens of zeros fill the packed part up to a multiple of 128).
        seed: int of at most 64 bits, or an int64 tensor, 0-d or (1,), on dz's device; as `mvue24`.
        row_scale: 0-d float32 on dz's device; only and always with `row_dtype`. The row-major copy
            is dz * row_scale, to nearest even, saturated (infinities too); NaN stays NaN.
        row_dtype: float8_e5m2, float8_e4m3fn, or None for the packed part alone.
        packed_scale: 0-d float32 on dz's device: packed values are MVUE(dz) * packed_scale as
            e4m3, likewise. The result's `scale` is its reciprocal.
        channels: where the channels lie in the whole layer, in sections whose sizes are multiples
            of 64; by default they are the layer's first.
        tokens: where the tokens lie among those that draws are counted over, in one or two runs
            (`mvue24/places.py`); by default they are the first.
        exact: the exact sampler, or the papers' approximation.
        strided: groups of tokens a quarter of all (zeros included) apart; columns of the packed
            part are in the order of groups, as the other operand's must be
            (`token_order.by_groups`). Rows stay as they are.
        row_amax, packed_amax: float32 (1,) on dz's device, raised to the largest |dz| and
            |MVUE(dz)| (before scaling); a NaN makes them NaN.
        error_flag: int32 (1,) on dz's device, set when a packed group has more than two non-zeros
            (which only infinities and NaN can cause).
        sums: float32 (N,) on dz's device: gets the sum of dz over tokens, a bias's gradient.
        backend: None, "reference" or "triton".

    Returns: ((T, N) of row_dtype or None, Packed24 of (N, T up to a multiple of 128)).

    Raises: KernelError on sizes, dtypes, arguments, or a backend that cannot run.
    """
    channels = channels or ((0, 0, dz.shape[-1]),)
    check_gradient("grad_pack24", dz, channels)
    check_places("grad_pack24", tokens, strided)
    check_seed("grad_pack24", seed, dz.device)
    how = Quantization(row_scale, row_dtype, packed_scale, row_amax, packed_amax, error_flag, sums)
    how.check("grad_pack24", dz.device)
    require("grad_pack24", "sums", sums, torch.float32, (dz.shape[1],), dz.device)
    run = dispatch.implementation(
        "grad_pack24", dz, backend, reference=_by_definition, triton=triton.grad_pack24
    )
    return run(dz, seed, channels, tokens, exact, strided, how)


def _by_definition(
    dz: torch.Tensor,
    seed: SeedLike,
    channels: Channels,
    tokens: Places,
    exact: bool,
    strided: bool,
    how: Quantization,
) -> tuple[torch.Tensor | None, Packed24]:
    row, packed, *found = reference.grad_pack24(
        dz, seed, channels, tokens, exact, strided, how.row_scale, how.row_dtype, how.packed_scale
    )
    how.record(*found)
    if how.sums is not None:
        torch.sum(dz, 0, dtype=torch.float32, out=how.sums)
    return row, packed
