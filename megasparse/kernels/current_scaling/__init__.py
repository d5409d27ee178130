"""What current scaling needs beside a quantiser: scales from a magnitude, and undoing them.

Neither waits for the device, so that a step that scales each tensor by its own amax never does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.current_scaling import reference, triton
from megasparse.kernels.packed24 import E4M3_MAX

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AmaxScales(NamedTuple):
    """Scales that follow from one magnitude; each float32, 0-d, in 16 bytes of its own.

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
    if amax.dtype != torch.float32 or amax.shape != (1,):
        raise KernelError(
            f"scales_of_amax: amax is {amax.dtype} of shape {tuple(amax.shape)}, expected "
            "float32 (1,)"
        )
    chosen = dispatch.resolve("scales_of_amax", amax, backend)
    # cuBLAS takes no scale at an address that is not a multiple of 16.
    out = torch.empty(4, 4, dtype=torch.float32, device=amax.device)
    implementation = triton if chosen == "triton" else reference
    with torch.cuda.device_of(amax):
        implementation.scales_of_amax(amax, maximum, power_of_two, out)
    return AmaxScales(*out[:, 0].unbind())


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
    if z.dtype not in DTYPES or not z.is_contiguous():
        raise KernelError(
            f"rescale_: z is {z.dtype} with strides {z.stride()}, expected contiguous floats"
        )
    for name, factor in (("a", a), ("b", b)):
        found = (factor.dtype, tuple(factor.shape), factor.device)
        if found != (torch.float32, (), z.device):
            raise KernelError(
                f"rescale_: {name} is {found[0]} of shape {found[1]} on {found[2]}, expected "
                f"float32, 0-d, on {z.device}"
            )
    if applied <= 0 or math.frexp(applied)[0] != 0.5:
        raise KernelError(f"rescale_: applied is {applied}, expected a power of two")
    chosen = dispatch.resolve("rescale_", z, backend)
    if z.numel():
        with torch.cuda.device_of(z):
            (triton if chosen == "triton" else reference).rescale(z, a, b, 1.0 / applied)
    return z
