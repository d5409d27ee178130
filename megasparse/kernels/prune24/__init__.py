"""Row-wise 2:4 magnitude pruning, and the question whether a tensor is 2:4."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.checks import WEIGHT_DTYPES, check_groups, run_pruning
from megasparse.kernels.prune24 import reference, triton


def prune24_mask(
    w: torch.Tensor, *, backend: str | None = None, nan_flag: torch.Tensor | None = None
) -> torch.Tensor:
    """Mask of the 2 largest magnitudes of each 4 consecutive entries along the last dimension.

    w: (..., K) float32, bfloat16, float16 or float8_e4m3fn, K a multiple of 4; a tensor that is not
    contiguous is copied first. Returns bool of `w`'s shape, contiguous, exactly two True per group.
    Of equal magnitudes the later index stays (an all-zero group keeps 2 and 3); -0.0 equals 0.0;
    infinities are equal and larger than every finite value. This is the selection of SR-STE and of
    the FST paper's baseline (Hu et al., ICML 2024).

    nan_flag: None, or int32 with 1 element on `w`'s device. Triton sets it to 1 when `w` holds a
    NaN, without synchronizing; the mask is then meaningless.
    Raises KernelError for another dtype, shape or backend; NumericsError for a NaN when `nan_flag`
    is None, and on CPU with the reference.
    """
    check_groups("prune24_mask", w)
    return run_pruning(
        "prune24_mask",
        w,
        backend=backend,
        nan_flag=nan_flag,
        reference=reference.prune24,
        kernel=triton.prune24,
    )


def is_24(w: torch.Tensor, dim: int = -1, *, backend: str | None = None) -> bool:
    """Whether each 4 consecutive entries of `w` along `dim` hold at most 2 non-zeros.

    w: any dtype of `prune24_mask`, or bool. -0.0 is zero; a NaN is not. Other dimensions than the
    last, and tensors that are not contiguous, are copied first. The answer is a Python bool, so on
    CUDA this synchronizes. Raises KernelError when the size along `dim` is no multiple of 4, or for
    a dtype or backend it cannot run.
    """
    if not -w.dim() <= dim < w.dim():
        raise KernelError(f"is_24: dim {dim} of a tensor of shape {tuple(w.shape)}")
    w = w.detach().movedim(dim, -1)
    check_groups("is_24", w, dtypes=(*WEIGHT_DTYPES, torch.bool))
    if w.numel() == 0:
        return True
    ask = dispatch.implementation(
        "is_24", w, backend, reference=reference.is_24, triton=triton.is_24
    )
    with torch.cuda.device_of(w):  # Triton launches on the current device
        return ask(w)
