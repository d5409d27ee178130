"""AdamW with a masked decay: the whole update of a piece of a weight in one pass."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import WIDE_DTYPES
from megasparse.kernels.masked_adamw import reference, triton
from megasparse.kernels.masked_adamw.arguments import AdamW as AdamW

_CHUNK = 1 << 22


def masked_adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    numbers: AdamW,
    mask: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
    *,
    derived: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of AdamW in place, with `lambda (1 - M) o W` on the gradient or the momentum.

        D = decay (1 - mask) weight,   g = clip grad
        gradient    g <- g + D;   m <- b1 m + (1 - b1) g;   u = m;       v <- b2 v + (1 - b2) g^2
        decoupled                 m <- b1 m + (1 - b1) g;   u = m + D;   v <- b2 v + (1 - b2) u^2
        of sign                   m as above;   u = kept m + decay sign(weight);   v as above
        weight <- weight (1 - lr wd) - lr / (1 - b1^step)  u / (sqrt(v / (1 - b2^step)) + eps)

    The first line is FST's (Hu et al., ICML 2024, eq. 1.4), the second AST's (Huang et al., AAAI
    2025, section 3.2), the third CAST's (Huang et al., 2025, algorithm 1) at masked entries; others
    have u = m. Without a mask all are AdamW.

    Args:
        weight, exp_avg, exp_avg_sq: float32, 1-D and contiguous, any size; the master weight and
            its moments.
        grad: float32, of that shape; it is left as it is.
        numbers: of the update.
        mask: bool, of that shape, contiguous; True is kept. None: no masked decay.
        copy: float32, bfloat16 or float16, of that shape, contiguous: gets the new weight.
        derived: float32 (11,) on the device, `numbers.derived()`: what a kernel reads instead, so
            that a captured one updates with other numbers at every replay.
        backend: None, "reference" or "triton".

    Raises: KernelError for other dtypes, shapes, devices or layouts, or when the backend cannot
        run.
    """
    _check(weight, {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, mask, copy)
    update = dispatch.implementation(
        "masked_adamw_", weight, backend, reference=_by_definition, triton=triton.masked_adamw_
    )
    with torch.cuda.device_of(weight):
        update(weight, grad, exp_avg, exp_avg_sq, numbers, mask, copy, derived)


def _by_definition(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    numbers: AdamW,
    mask: torch.Tensor | None,
    copy: torch.Tensor | None,
    derived: torch.Tensor | None,
) -> None:
    """In place, in pieces whose temporaries are small."""
    for start in range(0, weight.numel(), _CHUNK):
        at = slice(start, start + _CHUNK)
        new = reference.masked_adamw(
            weight[at],
            grad[at],
            exp_avg[at],
            exp_avg_sq[at],
            None if mask is None else mask[at],
            **numbers._asdict(),
        )
        for place, value in zip((weight, exp_avg, exp_avg_sq), new, strict=True):
            place[at].copy_(value)
    if copy is not None:
        copy.copy_(weight)


def _check(
    weight: torch.Tensor,
    others: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    copy: torch.Tensor | None,
) -> None:
    for name, tensor in {"weight": weight, **others}.items():
        if tensor.dtype != torch.float32:
            raise KernelError(f"masked_adamw_: {name} is {tensor.dtype}, expected torch.float32")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise KernelError(f"masked_adamw_: mask is {mask.dtype}, expected torch.bool")
        others = {**others, "mask": mask}
    if copy is not None:
        if copy.dtype not in WIDE_DTYPES:
            raise KernelError(
                f"masked_adamw_: copy is {copy.dtype}, expected float32, bfloat16 or float16"
            )
        others = {**others, "copy": copy}
    for name, tensor in {"weight": weight, **others}.items():
        if tensor.shape != weight.shape or tensor.device != weight.device:
            raise KernelError(
                f"masked_adamw_: {name} of shape {tuple(tensor.shape)} on {tensor.device}, "
                f"expected {tuple(weight.shape)} on {weight.device} as weight"
            )
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise KernelError(
                f"masked_adamw_: {name} of shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}, expected one contiguous dimension"
            )
