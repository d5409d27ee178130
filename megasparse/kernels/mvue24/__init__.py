"""MVUE: unbiased random 2:4 pruning of gradients."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.mvue24 import reference, triton, triton_squares
from megasparse.kernels.random import SeedLike, check_seed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def mvue24(
    g: torch.Tensor,
    *,
    seed: SeedLike,
    dim: int = -1,
    offsets: tuple[int, int] = (0, 0),
    exact: bool = True,
    strided: bool = False,
    groups: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """An unbiased random estimate of `g` with at most 2 of each 4 entries along `dim` non-zero.

    `exact=True` is the minimum-variance unbiased estimator (Chmiel et al., ICLR 2023): entry i of
    a group is kept with p_i = min(1, c |g_i|), sum p_i = 2, and becomes g_i / p_i. An entry larger
    than the three others together is kept bit for bit. `exact=False` is the approximation that FST
    and S-STE use: two draws without replacement in proportion to |g_i|, value g_i / p_i. Both need
    one Philox2x32 block a group and return one-hot groups bit for bit and zero groups as zeros.

    Args:
        g: (R, C) float32, bfloat16 or float16, any strides (dense row- and column-major without a
            copy; others are copied). Arithmetic is float32.
        seed: int of at most 64 bits, or an int64 tensor, 0-d or (1,), on g's device (read by the
            kernel: no synchronization and no recompilation when it changes). See
            `random.derive_seed`.
        dim: the dimension that the groups of 4 consecutive entries run along. A size that is no
            multiple of 4 counts as padded with zeros.
        offsets: global index of g[0, 0]. The numbers drawn depend on (seed, global group index
            along dim, global index of the other dimension) alone, so a shard gets the result of
            its place in the whole tensor. offsets[dim] must be a multiple of 4.
        strided: groups are entries a quarter of the size along `dim` apart (`token_order.py`)
            instead of neighbours. offsets[dim] must be 0: g is whole along `dim`.
        groups: int64 (ceil(size / 4),) on g's device, below 2^32: the global index of every group
            along dim, in place of consecutive ones from offsets[dim] on. So rows that come in any
            order (the tokens of an expert) draw the numbers of their place.
        backend: None, "reference" or "triton".

    Returns: like g (shape, dtype; row- or column-major as g), outside autograd. Unbiased up to
    float32 rounding, the 2^-24 grid of the uniform numbers and the rounding to g's dtype. A float16
    result may overflow to infinity: a kept magnitude can reach the sum of its group.

    A NaN or an infinity is never hidden: a group with one keeps one (and at most two non-zeros, as
    always); finite magnitudes whose sum overflows float32 give infinities.

    Raises: KernelError on a wrong rank, dtype, dim, offset, seed or backend.
    """
    dim = _check(g, dim, offsets)
    if strided and offsets[dim]:
        raise KernelError(f"mvue24: offsets={offsets}, expected 0 along dim={dim} where strided")
    if groups is not None:
        _check_groups(g, dim, offsets, groups)
        if strided:
            raise KernelError("mvue24: groups and strided are both given, expected one of them")
    check_seed("mvue24", seed, g.device)
    sample = dispatch.implementation(
        "mvue24", g, backend, reference=reference.mvue24, triton=triton.mvue24
    )
    if g.numel() == 0:
        return torch.empty_like(g)
    return sample(g, seed, dim, offsets, exact, strided, groups)


@torch.no_grad()
def mvue24_squares(
    g: torch.Tensor,
    *,
    dim: int = -1,
    exact: bool = True,
    strided: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """float64 (2,): |g|^2 and E|mvue24(g) - g|^2, in one pass over g and without a draw.

    Nothing waits for the device, and the same g gives the same bits. Arguments are those of
    `mvue24`. A NaN or an infinity in g makes the second number NaN or infinite.

    Raises: KernelError on a wrong rank, dtype, dim or backend.
    """
    dim = _check(g, dim, (0, 0))
    squares = dispatch.implementation(
        "mvue24_squares", g, backend, reference=reference.squares, triton=triton_squares.squares
    )
    if g.numel() == 0:
        return torch.zeros(2, dtype=torch.float64, device=g.device)
    with torch.cuda.device_of(g):  # Triton launches on the current device
        return squares(g, dim, exact, strided)


def mvue24_variance(
    g: torch.Tensor,
    *,
    dim: int = -1,
    exact: bool = True,
    strided: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """0-d float64: E|mvue24(g) - g|^2, without a draw.

    The estimator is unbiased, so this is E|mvue24(g)|^2 - |g|^2. Arguments and errors are those of
    `mvue24_squares`.
    """
    return mvue24_squares(g, dim=dim, exact=exact, strided=strided, backend=backend)[1]


def _check_groups(
    g: torch.Tensor, dim: int, offsets: tuple[int, int], groups: torch.Tensor
) -> None:
    count = (g.shape[dim] + 3) // 4
    if groups.shape != (count,) or groups.dtype != torch.int64 or groups.device != g.device:
        raise KernelError(
            f"mvue24: groups are {groups.dtype} {tuple(groups.shape)} on {groups.device}, expected "
            f"int64 ({count},) on {g.device}"
        )
    if offsets[dim]:
        raise KernelError(f"mvue24: offsets={offsets} with groups, expected 0 along dim={dim}")


def _check(g: torch.Tensor, dim: int, offsets: tuple[int, int]) -> int:
    """`dim` as 0 or 1; KernelError when the arguments do not fit."""
    if g.dim() != 2:
        raise KernelError(f"mvue24: g has shape {tuple(g.shape)}, expected 2 dimensions")
    if g.dtype not in DTYPES:
        raise KernelError(f"mvue24: g is {g.dtype}, expected float32, bfloat16 or float16")
    if dim not in (-2, -1, 0, 1):
        raise KernelError(f"mvue24: dim={dim}, expected -2, -1, 0 or 1")
    dim %= 2
    if len(offsets) != 2 or min(offsets) < 0:
        raise KernelError(f"mvue24: offsets={offsets}, expected two numbers of at least 0")
    if offsets[dim] % 4:
        raise KernelError(f"mvue24: offsets={offsets}, expected a multiple of 4 along dim={dim}")
    groups = (offsets[dim] + g.shape[dim] + 3) // 4
    if max(groups, offsets[1 - dim] + g.shape[1 - dim]) > 1 << 32:
        raise KernelError(f"mvue24: offsets={offsets}, expected group indices below 2^32")
    return dim
