"""AdamW with a masked decay: four tensors and a mask are read once, three and a copy written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megasparse.kernels.device.groups import from_fp32
from megasparse.kernels.launches import KINDS, Launch, Launches
from megasparse.kernels.masked_adamw.arguments import AdamW

LAUNCHES = Launches(wide=Launch(block=1024, num_warps=4), narrow=Launch(block=1024, num_warps=4))


@triton.jit
def _masked_adamw_kernel(
    weight,
    grad,
    exp_avg,
    exp_avg_sq,
    mask,
    copy,
    numbers,
    size,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    OF_SIGN: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    clip, decay = tl.load(numbers), tl.load(numbers + 1)
    rest1, beta2, rest2 = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    eps, kept = tl.load(numbers + 5), tl.load(numbers + 6)
    step_size, correction = tl.load(numbers + 7), tl.load(numbers + 8)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < tl.where(tl.load(numbers + 9) != 0.0, size, 0)  # else nothing is touched
    w = tl.load(weight + at, mask=live, other=0.0)
    g = tl.load(grad + at, mask=live, other=0.0) * clip
    m = tl.load(exp_avg + at, mask=live, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=live, other=0.0)
    if DECAYS:
        stays = tl.load(mask + at, mask=live, other=0) != 0
        size = w
        if OF_SIGN:
            size = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, w))
        term = size * decay
        if not DECOUPLED:
            g = tl.where(stays, g, g + term)
    m = m + rest1 * (g - m)
    update = m
    squared = g
    if DECAYS and DECOUPLED:
        beside = m
        if OF_SIGN:
            beside = m * tl.load(numbers + 10)
        update = tl.where(stays, m, beside + term)
        squared = update
    v = v * beta2 + rest2 * squared * squared
    denominator = tl.div_rn(tl.sqrt_rn(v), correction) + eps
    w = w * kept - step_size * tl.div_rn(update, denominator)
    tl.store(weight + at, w, mask=live)
    tl.store(exp_avg + at, m, mask=live)
    tl.store(exp_avg_sq + at, v, mask=live)
    if COPY == "fp32":
        tl.store(copy + at, w, mask=live)
    elif COPY != "none":
        bits = tl.where(w != w, 0x7FC00000 if COPY == "bf16" else 0x7E000000, from_fp32(w, COPY))
        tl.store(copy + at, (bits >> 16).to(tl.int16), mask=live)


def masked_adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    numbers: AdamW,
    mask: torch.Tensor | None,
    copy: torch.Tensor | None,
    derived: torch.Tensor | None,
) -> None:
    """`reference.masked_adamw`, in place."""
    size = weight.numel()
    if size == 0:
        return
    if derived is None:
        derived = torch.tensor(numbers.derived(), device=weight.device)
    kind = "none" if copy is None else KINDS[copy.dtype]
    narrow = kind in ("bf16", "fp16")
    launch = LAUNCHES.pick(weight)
    _masked_adamw_kernel[(triton.cdiv(size, launch.block),)](
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        weight if mask is None else mask.view(torch.uint8),
        weight if copy is None else copy.view(torch.int16) if narrow else copy,
        derived,
        size,
        DECAYS=mask is not None,
        DECOUPLED=numbers.decoupled,
        OF_SIGN=numbers.of_sign,
        COPY=kind,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
