"""The continuous projection of S-STE and its scale."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megasparse.errors import KernelError
from megasparse.kernels.checks import WIDE_DTYPES, check_groups, run_pruning
from megasparse.kernels.soft_threshold24 import reference, triton


def soft_threshold24(
    w: torch.Tensor, *, backend: str | None = None, nan_flag: torch.Tensor | None = None
) -> torch.Tensor:
    """S-STE's projection before scaling: sign(a) * max(|a| - t, 0) in each group of 4.

    `t` is the second smallest magnitude of the group, so at most two entries stay non-zero and the
    function is continuous (S-STE, Hu et al., NeurIPS 2024). Gradients do not flow through it: S-STE
    takes the gradient of the projection as that of the weight.

    w: (..., K) float32, bfloat16 or float16, K a multiple of 4; a tensor that is not contiguous is
    copied first. Returns `w`'s shape and dtype, contiguous; the difference is taken in float32 and
    rounded once. Entries with |a| <= t are +0.0. An infinity stays one unless t is infinite too:
    a group with three or more infinities is all zero.

    nan_flag: None, or int32 with 1 element on `w`'s device. Triton sets it to 1 when `w` holds a
    NaN, without synchronizing; the result is then meaningless.
    Raises KernelError for another dtype, shape or backend; NumericsError for a NaN when `nan_flag`
    is None, and on CPU with the reference.
    """
    check_groups("soft_threshold24", w, dtypes=WIDE_DTYPES)
    return run_pruning(
        "soft_threshold24",
        w,
        backend=backend,
        nan_flag=nan_flag,
        reference=reference.soft_threshold24,
        kernel=triton.soft_threshold24,
    )


def soft_threshold24_with_sums(
    w: torch.Tensor, *, backend: str | None = None, nan_flag: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`soft_threshold24(w)` and the two sums of `s_ste_scale`, in one pass over `w`.

    Returns (S, sums): S as `soft_threshold24` gives it, sums float64 (2,) on `w`'s device: <W, S>
    and <S, S>, for `scale_from_sums`. Arguments and errors as for `soft_threshold24`.
    """
    check_groups("soft_threshold24_with_sums", w, dtypes=WIDE_DTYPES)
    return run_pruning(
        "soft_threshold24_with_sums",
        w,
        backend=backend,
        nan_flag=nan_flag,
        reference=lambda w: (reference.soft_threshold24(w), reference.scale_sums(w)),
        kernel=triton.soft_threshold24_with_sums,
    )


def scale_from_sums(sums: torch.Tensor) -> torch.Tensor:
    """float32 beta = <W, S> / <S, S> of float64 (2,) sums, 0-d, or of (2, E), (E,); 1 when <S, S>
    is zero."""
    numerator, denominator = sums.unbind()
    zero = denominator == 0
    scale = numerator / torch.where(zero, torch.ones_like(denominator), denominator)
    return torch.where(zero, torch.ones_like(scale), scale).to(torch.float32)


def s_ste_scale(
    w: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
    *,
    experts: int = 1,
    backend: str | None = None,
    nan_flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scale beta = <W, S> / <S, S> that minimizes |W - beta * S|^2, S = soft_threshold24(W).

    One number per weight, computed once and then frozen (S-STE, Hu et al., NeurIPS 2024).

    w: as for `soft_threshold24`; a shard of the weight when `reduce` is given. `reduce` gets the
    two dot products as one float64 tensor of 2 elements and sums it over the ranks that hold the
    other shards: it returns the sums, or None after summing in place. Returns a 0-d float32 tensor
    on `w`'s device; 1 when <S, S> is zero.

    experts: weights that are stacked along dimension 0 of `w` `(E N, K)`, each with a scale of its
    own. Above 1, `reduce` gets a tensor `(2, E)`, and the result is `(E,)`.

    S is taken as rounded to `w`'s dtype. The reference accumulates in float64; Triton in float32
    within a program, then in float64 over the programs, always in the same order (its squares need
    weights between 1e-19 and 1e19).
    Raises as `soft_threshold24` does.
    """
    check_groups("s_ste_scale", w, dtypes=WIDE_DTYPES)
    if experts > 1:
        sums = _sums_of_each(w, experts, backend, nan_flag)
    else:
        sums = run_pruning(
            "s_ste_scale",
            w,
            backend=backend,
            nan_flag=nan_flag,
            reference=reference.scale_sums,
            kernel=triton.scale_sums,
        )
    if reduce is not None:
        reduced = reduce(sums)
        sums = sums if reduced is None else reduced
    return scale_from_sums(sums)


def _sums_of_each(
    w: torch.Tensor, experts: int, backend: str | None, nan_flag: torch.Tensor | None
) -> torch.Tensor:
    """float64 (2, E): the sums of `s_ste_scale` of stacked weights, from one projection of all.

    Every product is of two numbers of at most 24 bits and exact in float64.
    """
    if w.dim() != 2 or w.shape[0] % experts:
        raise KernelError(
            f"s_ste_scale: w {tuple(w.shape)} of {experts} experts, expected (E N, K)"
        )
    projected = soft_threshold24(w, backend=backend, nan_flag=nan_flag)
    weights, shrunk = (t.reshape(experts, -1).double() for t in (w, projected))
    return torch.stack([(weights * shrunk).sum(1), shrunk.square().sum(1)])
