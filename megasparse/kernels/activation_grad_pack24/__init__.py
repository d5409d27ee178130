"""Both operands of the gradient of a projection before an activation, which is never written."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.activation.kinds import Activation, is_gated
from megasparse.kernels.activation.reference import backward_fused
from megasparse.kernels.activation_grad_pack24 import reference, triton
from megasparse.kernels.checks import require
from megasparse.kernels.factors import Factors, Lacking, given, lacking
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.grad_pack24.quantization import Quantization, check_gradient
from megasparse.kernels.mvue24.places import FIRST, Places, check_places
from megasparse.kernels.mvue_pack24 import Channels
from megasparse.kernels.packed24 import ROW_MULTIPLE, Packed24
from megasparse.kernels.random import SeedLike, check_seed


@torch.no_grad()
def activation_grad_pack24(
    dy: torch.Tensor,
    fused: torch.Tensor,
    *,
    seed: SeedLike,
    activation: Activation = "swiglu",
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
    dy_factors: Factors | None = None,
    factors: Factors | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, Packed24]:
    """`grad_pack24` of the gradient of a projection whose output went into `activated`.

    What `activation_backward`, rounded to 16 bits, gives to `grad_pack24`: that gradient is never
    written.

    Args:
        dy: (T, F) gradient of the activation's output.
        fused: (T, 2 F) its input [gate | x], for "gelu" (T, F), of the dtype of dy; F a multiple of
            64. Both are read row-major (copied otherwise).
        activation: "swiglu", "geglu" or "gelu".
        channels: sections of the channels of `fused`; of a gated activation none may cross the
            middle unless what lies on both sides of it is adjacent in the whole layer too. Each
            half, for "gelu" the whole, is one piece.
        tokens: where the tokens lie among those that draws are counted over, in one or two runs
            (`mvue24/places.py`); by default they are the first.
        seed: int of at most 64 bits, or an int64 tensor, 0-d or (1,), on the device of dy.
        dy_factors, factors: what dy and `fused` lack (`kernels/factors.py`), powers of two; None:
            nothing.
        Others: of `grad_pack24`.

    Returns: as `grad_pack24` of a gradient like `fused`, but the first as long as the second: T' is
    T up to a multiple of 128, with zeros.

    Raises: KernelError on sizes, dtypes, arguments, or a backend that cannot run.
    """
    op = "activation_grad_pack24"
    channels = channels or ((0, 0, fused.shape[-1]),)
    check_gradient(op, fused, channels)
    check_places(op, tokens, strided)
    parts = 1 + is_gated(activation)
    width = fused.shape[1] // parts
    require(op, "dy", dy, fused.dtype, (fused.shape[0], width), fused.device)
    if fused.shape[1] % (parts * ROW_MULTIPLE):
        raise KernelError(
            f"{op}: fused has {fused.shape[1]} channels, expected a multiple of "
            f"{parts * ROW_MULTIPLE}"
        )
    places = tuple(_place(channels, part * width, width) for part in range(parts))
    check_seed(op, seed, fused.device)
    how = Quantization(row_scale, row_dtype, packed_scale, row_amax, packed_amax, error_flag, sums)
    how.check(op, fused.device)
    require(op, "sums", sums, torch.float32, (fused.shape[1],), fused.device)
    run = dispatch.implementation(
        op, fused, backend, reference=_by_definition, triton=triton.activation_grad_pack24
    )
    lacks = (lacking(op, one, fused.device) for one in (dy_factors, factors))
    return run(dy, fused, activation, seed, places, tokens, exact, strided, how, *lacks)


def _by_definition(
    dy: torch.Tensor,
    fused: torch.Tensor,
    activation: Activation,
    seed: SeedLike,
    places: tuple[int, ...],
    tokens: Places,
    exact: bool,
    strided: bool,
    how: Quantization,
    dy_factors: Lacking,
    factors: Lacking,
) -> tuple[torch.Tensor | None, Packed24]:
    dy, fused = given(dy, dy_factors), given(fused, factors)
    row, packed, *found = reference.activation_grad_pack24(
        dy,
        fused,
        activation,
        seed,
        places,
        tokens,
        exact,
        strided,
        how.row_scale,
        how.row_dtype,
        how.packed_scale,
    )
    how.record(*found)
    if how.sums is not None:
        dz = backward_fused(dy, fused, activation)
        torch.sum(dz, 0, dtype=torch.float32, out=how.sums)
    return row, packed


def _place(channels: Channels, start: int, length: int) -> int:
    """Where channel `start` lies in the whole layer; the `length` channels must lie together."""
    for first, place, size in channels:
        if first <= start and start + length <= first + size:
            return place + start - first
    raise KernelError(
        f"activation_grad_pack24: sections {channels} of channels cut a run of {length}"
    )
