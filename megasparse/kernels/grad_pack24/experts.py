"""`grad_pack24` of the tokens of experts: each expert's packed draw, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.kernels.dispatch import implementation
from megasparse.kernels.float8 import E5M2, quantize
from megasparse.kernels.grad_pack24 import triton
from megasparse.kernels.grad_pack24.quantization import Quantization, check_gradient
from megasparse.kernels.mvue24.reference import mvue24
from megasparse.kernels.mvue_pack24 import Channels
from megasparse.kernels.mvue_pack24.experts import check_experts
from megasparse.kernels.pack24.reference import pack24
from megasparse.kernels.packed24 import COLUMN_MULTIPLE, E4M3, Packed24, parts_of
from megasparse.kernels.random import SeedLike, check_seed

OP = "grad_pack24_experts"


@torch.no_grad()
def grad_pack24_experts(
    dz: torch.Tensor,
    counts: Sequence[int],
    groups: torch.Tensor,
    *,
    seed: SeedLike,
    row_scale: torch.Tensor | None = None,
    row_dtype: torch.dtype | None = E5M2,
    packed_scale: torch.Tensor,
    channels: Channels | None = None,
    exact: bool = True,
    row_amax: torch.Tensor | None = None,
    packed_amax: torch.Tensor | None = None,
    error_flag: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, tuple[Packed24, ...]]:
    """`grad_pack24` of tokens that are sorted by expert, with a packed part for each.

    Args:
        dz: (T, N), 16 bits.
        counts: tokens of each expert, multiples of 128, at least one above 0; T in all.
        groups: int64 (T / 4,), below 2^32, on dz's device: what each group of four tokens draws by,
            as in `mvue24`.
        The others are those of `grad_pack24`.

    Returns: ((T, N) of row_dtype or None, of each expert a Packed24 of (N, its tokens)).

    Raises: as `grad_pack24`.
    """
    channels = channels or ((0, 0, dz.shape[-1]),)
    check_gradient(OP, dz, channels)
    check_seed(OP, seed, dz.device)
    how = Quantization(row_scale, row_dtype, packed_scale, row_amax, packed_amax, error_flag)
    how.check(OP, dz.device)
    check_experts(OP, dz, counts, groups, COLUMN_MULTIPLE[E4M3])
    run = implementation(
        OP, dz, backend, reference=_by_definition, triton=triton.grad_pack24_experts
    )
    return run(dz, seed, groups, counts, channels, exact, how)


def _by_definition(
    dz: torch.Tensor,
    seed: SeedLike,
    groups: torch.Tensor,
    counts: Sequence[int],
    channels: Channels,
    exact: bool,
    how: Quantization,
) -> tuple[torch.Tensor | None, tuple[Packed24, ...]]:
    row, whole, _ = how.new_outputs(dz, dz.shape[0])
    if row is not None:
        assert how.row_scale is not None and how.row_dtype is not None
        row = quantize(dz, how.row_scale, how.row_dtype)
    drawn = torch.cat(
        [
            mvue24(dz[:, start : start + n].float(), seed, 0, (0, place), exact, False, groups)
            for start, place, n in channels
        ],
        1,
    )
    scale_inv = how.packed_scale.reciprocal()
    whole.scale.copy_(scale_inv)
    packed = parts_of(whole, counts)
    crowded = torch.zeros((), dtype=torch.bool, device=dz.device)
    for one, part in zip(packed, quantize(drawn.t(), how.packed_scale, E4M3).split(counts, 1)):
        if part.shape[1]:
            found, more = pack24(part, E4M3, scale_inv)
            one.copy_(found)
            crowded = crowded | more
    how.record(dz.float().abs().amax(), drawn.abs().amax(), crowded)
    return row, packed
