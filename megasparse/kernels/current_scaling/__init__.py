"""What current scaling needs beside a quantizer: scales from a magnitude, and undoing them.

Neither waits for the device, so that a step that scales each tensor by its own amax never does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import WIDE_DTYPES, require, require_power_of_two
from megasparse.kernels.current_scaling import reference, triton
from megasparse.kernels.packed24 import E4M3_MAX


class AmaxScales(NamedTuple):
    """Scales that follow from one magnitude; each float32, 0-d.

    The address of each is a multiple of 16: cuBLAS takes no scale at another.

    Attributes:
        scale: the multiplier for a tensor of that magnitude.
        scale_inv: 1 / scale.
        draw_scale, draw_scale_inv: for MVUE draws from it, in e4m3.
    """

    scale: torch.Tensor
    scale_inv: torch.Tensor
    draw_scale: torch.Tensor
    draw_scale_inv: torch.Tensor


@torch.no_grad()
def scale_inv_of(w: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """What undoes the e4m3 scaling of w by its own amax: amax / 448 (S-STE, Hu et al., 2024).

    w: (N, K) float32, bfloat16 or float16, not empty; any row stride, copied unless its rows are
    contiguous. Returns a 0-d float32 tensor on `w`'s device, without a synchronization: 1 for a
    tensor of zeros, at least 2^-126 (so that its reciprocal is finite), and infinite or NaN when
    `w` holds an infinity or a NaN.

    Raises KernelError for another shape, dtype or backend.
    """
    if w.dim() != 2 or not w.numel() or w.dtype not in WIDE_DTYPES:
        raise KernelError(
            f"scale_inv_of: w is {w.dtype} of shape {tuple(w.shape)}, expected a non-empty matrix "
            "of float32, bfloat16 or float16"
        )
    find = dispatch.implementation(
        "scale_inv_of", w, backend, reference=reference.scale_inv_of, triton=triton.scale_inv_of
    )
    with torch.cuda.device_of(w):  # Triton launches on the current device
        return find(w)


@torch.no_grad()
def scales_of_amax(
    amax: torch.Tensor,
    *,
    maximum: float = E4M3_MAX,
    power_of_two: bool = False,
    backend: str | None = None,
) -> AmaxScales:
    """Transformer Engine's current scaling, `scale = maximum / amax`, and that of MVUE draws.

    1 where the amax is zero, infinite or NaN; float32's largest number where the quotient overflows
    (`compute_scale_from_amax` without powers of two or epsilon). A draw keeps at most twice the
    largest magnitude of its group (mvue24/README.md), so its scale is 448 / (2 amax).

    Args:
        amax: float32 (1,).
        maximum: of the format, 448 or 57344.
        power_of_two: round scales down to powers of two, at most 2^126, so that their reciprocals
            are exact and normal.

    Raises: KernelError for another shape, dtype or backend.
    """
    require("scales_of_amax", "amax", amax, torch.float32, (1,), amax.device)
    find = dispatch.implementation(
        "scales_of_amax",
        amax,
        backend,
        reference=reference.scales_of_amax,
        triton=triton.scales_of_amax,
    )
    with torch.cuda.device_of(amax):  # Triton launches on the current device
        return AmaxScales(*find(amax, maximum, power_of_two))


@torch.no_grad()
def rescale_(
    z: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    applied: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """z *= a * b / applied, in place; returns `z`. It undoes the scaling of a product's operands.

    Where the factor is 1, because the product was computed with `applied` as its factor already, z
    is neither read nor written. Nothing waits for the device.

    z: bfloat16, float16 or float32, contiguous, any shape. a, b: 0-d float32 on its device.
    applied: a power of two. The factor is (a / applied) * b, rounded to float32; the product with
    it is rounded to float32, then once more to z's dtype. (torch's own product of a 16-bit tensor
    with a 0-d one rounds the factor to 16 bits first.)

    Raises: KernelError for other dtypes, shapes, devices or backends.
    """
    if z.dtype not in WIDE_DTYPES or not z.is_contiguous():
        raise KernelError(
            f"rescale_: z is {z.dtype} with strides {z.stride()}, expected contiguous floats"
        )
    for name, factor in (("a", a), ("b", b)):
        require("rescale_", name, factor, torch.float32, (), z.device)
    require_power_of_two("rescale_", "applied", applied)
    rescale = dispatch.implementation(
        "rescale_", z, backend, reference=_by_definition, triton=triton.rescale_
    )
    if z.numel():
        with torch.cuda.device_of(z):
            rescale(z, a, b, 1.0 / applied)
    return z


def _by_definition(z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, applied_inv: float) -> None:
    z.copy_(reference.rescaled(z, a, b, applied_inv))
