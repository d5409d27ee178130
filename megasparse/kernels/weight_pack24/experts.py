"""`weight_pack24` of stacked weights of experts: the operands of every expert, in one launch."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels.checks import run_pruning, set_flag
from megasparse.kernels.float8 import raise_amax
from megasparse.kernels.packed24 import PackedStack
from megasparse.kernels.weight_pack24 import reference, triton
from megasparse.kernels.weight_pack24.arguments import check_tensors, check_weight, not_24

# W~ of each expert packed, and W~^T packed, dense (E, K, N) or not wanted.
ExpertOperands = tuple[PackedStack, PackedStack | torch.Tensor | None]


@torch.no_grad()
def weight_pack24_experts(
    w: torch.Tensor,
    experts: int,
    mask: torch.Tensor | None = None,
    *,
    threshold_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: torch.Tensor | None = None,
    transposed: str | None = "packed",
    amax: torch.Tensor | None = None,
    error_flag: torch.Tensor | None = None,
    nan_flag: torch.Tensor | None = None,
    out: ExpertOperands | None = None,
    backend: str | None = None,
) -> ExpertOperands:
    """What `weight_pack24` gives for each of E weights `(N, K)` that are stacked in w.

    Args:
        w: (E N, K).
        experts: E.
        threshold_scale: float32 (E,), where there is no mask.
        out: what an earlier call gave for the same shape, experts, `dtype` and `transposed`.
        The others are those of `weight_pack24`; `scale`, `amax` and the flags are of all experts.

    Returns: (the packed W~ of each, what `transposed` asks for of each). All share one scale.

    Raises: as `weight_pack24`.
    """
    dtype = w.dtype if dtype is None else dtype
    if w.dim() != 2 or experts < 1 or w.shape[0] % experts:
        raise KernelError(
            f"weight_pack24_experts: w has shape {tuple(w.shape)}, expected rows of {experts} "
            "experts"
        )
    rows, columns = w.shape[0] // experts, w.shape[1]
    check_weight(w[:rows], None if mask is None else mask[:rows], dtype, transposed)
    check_tensors(w, mask, dtype, threshold_scale, scale, amax, error_flag)
    if threshold_scale is not None and threshold_scale.shape != (experts,):
        raise KernelError(
            f"weight_pack24_experts: threshold_scale has shape {tuple(threshold_scale.shape)}, "
            f"expected ({experts},)"
        )
    if out is None:
        out = _new(experts, (rows, columns), dtype, transposed, w.device)
    operands = out
    asynchronous = w.is_cuda and error_flag is not None
    flag = error_flag if asynchronous else w.new_zeros(1, dtype=torch.int32)
    assert flag is not None
    given = (mask, threshold_scale, scale)

    def by_definition(w: torch.Tensor) -> ExpertOperands:
        _fill_by_definition(w, operands, dtype, transposed, *given, amax, flag)
        return operands

    def by_triton(w: torch.Tensor, nan_flag: torch.Tensor) -> ExpertOperands:
        packed, other = operands
        first = other.each[0] if isinstance(other, PackedStack) else other
        prune = transposed == "double-pruned"
        triton.weight_pack24(
            w, *given, packed.each[0], first, prune, amax, flag, nan_flag, parts=experts
        )
        return operands

    run_pruning(
        "weight_pack24_experts",
        w,
        backend=backend,
        nan_flag=nan_flag,
        reference=by_definition,
        kernel=by_triton,
    )
    if not asynchronous and flag.item():
        raise not_24(mask)
    return operands


def _new(
    experts: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    transposed: str | None,
    device: torch.device,
) -> ExpertOperands:
    """Memory for the operands."""
    rows, columns = shape
    scale_inv = torch.empty((), dtype=torch.float32, device=device)
    packed = PackedStack.empty(experts, shape, dtype, scale_inv, device)
    if transposed in ("packed", "double-pruned"):
        return packed, PackedStack.empty(experts, (columns, rows), dtype, scale_inv, device)
    if transposed == "dense":
        return packed, torch.empty((experts, columns, rows), dtype=dtype, device=device)
    return packed, None


def _fill_by_definition(
    w: torch.Tensor,
    out: ExpertOperands,
    dtype: torch.dtype,
    transposed: str | None,
    mask: torch.Tensor | None,
    threshold_scale: torch.Tensor | None,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    flag: torch.Tensor,
) -> None:
    """One expert after the other, by the definition of one weight."""
    stack, others = out
    count = len(stack.each)
    masks = [None] * count if mask is None else mask.chunk(count)
    betas = [None] * count if threshold_scale is None else threshold_scale.unbind()
    for n, (part, m, beta) in enumerate(zip(w.chunk(count), masks, betas, strict=True)):
        found = reference.weight_pack24(part, m, beta, dtype, scale, transposed)
        packed, other, largest, crowded = found
        stack.each[n].copy_(packed)
        if isinstance(others, PackedStack):
            others.each[n].copy_(other)  # type: ignore[arg-type]  # both are of one kind
        elif others is not None:
            bits = torch.int16 if dtype.itemsize == 2 else torch.int8
            assert isinstance(other, torch.Tensor)
            others.view(bits)[n].copy_(other.view(bits))
        raise_amax(amax, largest)
        set_flag(flag, crowded)
