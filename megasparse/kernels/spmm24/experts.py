"""Products of many packed matrices, each with its own rows: those of a layer's experts.

On cuSPARSELt each is a launch of its own, one after the other or in turns on streams. There are
dozens in a layer, so what surrounds them is kept short: operands that lie one after the other are
addresses, not tensors, and arguments are checked once for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megasparse.errors import KernelError
from megasparse.kernels.dispatch import resolve
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.kernels.spmm24 import matmul24, spmm24
from megasparse.kernels.spmm24.binding import Problem, plan

Streams = Sequence[torch.cuda.Stream]


@torch.no_grad()
def spmm24_experts(
    packed: Sequence[Packed24],
    x: torch.Tensor,
    counts: Sequence[int],
    *,
    algorithm: int = 0,
    alpha: float | None = None,
    streams: Streams = (),
    backend: str | None = None,
) -> torch.Tensor:
    """`x_e W_e^T` of every expert, (T, N); of an e4m3 x bfloat16.

    Args:
        packed: W (N, K) of each, of one shape and dtype.
        x: (T, K), sorted by expert.
        counts: rows of each, T in all; on cuSPARSELt in multiples of 16 bytes of x.
        streams: for products in turns, which the current stream waits for; none: one after the
            other.
        algorithm, alpha, backend: as in `spmm24`.

    Raises: KernelError when shapes or dtypes do not fit or the backend cannot run.
    """
    out = x.new_empty(x.shape[0], packed[0].shape[0], dtype=_out_dtype(x.dtype))
    tiles = _check("spmm24_experts", packed, (x,), counts, (packed[0].shape[1],), x.shape[0])
    parts = x.split(list(counts)), out.split(list(counts))
    name = resolve("spmm24_experts", x, backend, "cusparselt")
    if name == "reference" or not tiles or alpha is None:
        for one, rows, z in zip(packed, *parts, strict=True):
            if len(rows):
                spmm24(one, rows, algorithm=algorithm, alpha=alpha, out=z, backend=name)
        return out
    rows_bytes, out_bytes = x.stride(0) * x.itemsize, out.shape[1] * out.itemsize
    b, d = x.data_ptr(), out.data_ptr()
    tasks = []
    for one, count in zip(packed, counts, strict=True):
        if count:
            (n, k), kinds = one.shape, (one.dtype, x.dtype, out.dtype)
            problem = Problem(n, k, count, *kinds, False, False, algorithm)
            tasks.append((problem, one.buffer.data_ptr(), b, d))
        b, d = b + count * rows_bytes, d + count * out_bytes
    _run(tasks, alpha, streams, x.device)
    return out


@torch.no_grad()
def matmul24_experts(
    packed: Sequence[Packed24],
    each: Sequence[torch.Tensor],
    *,
    transposed: bool = False,
    algorithm: int = 0,
    alpha: float | None = None,
    streams: Streams = (),
    backend: str | None = None,
) -> torch.Tensor:
    """`A_e b_e` of every expert, (E, N, M); zeros of one whose A has no columns.

    Args:
        packed: A (N, K_e) of each.
        each: b (K_e, M) of each, or (M, K_e) if `transposed`, as 8 bits must be; row-major without
            a copy.
        algorithm, alpha, streams, backend: as above.

    Raises: as above.
    """
    dim, first = 1 if transposed else 0, each[0]
    width = first.shape[1 - dim]
    out = first.new_empty(len(packed), packed[0].shape[0], width, dtype=_out_dtype(first.dtype))
    lengths = [one.shape[1] for one in packed]
    total = sum(part.shape[dim] for part in each)
    tiles = _check("matmul24_experts", packed, each, lengths, (), total)
    name = resolve("matmul24_experts", first, backend, "cusparselt")
    slow = name == "reference" or not tiles or alpha is None or width * first.itemsize % 16 != 0
    tasks = []
    d, out_bytes = out.data_ptr(), out[0].numel() * out.itemsize
    for number, (one, part) in enumerate(zip(packed, each, strict=True)):
        if not part.shape[dim]:
            out[number].zero_()
        elif slow:
            how = {"transposed": transposed, "algorithm": algorithm, "alpha": alpha}
            matmul24(one, part, **how, out=out[number], backend=name)  # type: ignore[arg-type]
        else:
            (n, k), kinds = one.shape, (one.dtype, part.dtype, out.dtype)
            problem = Problem(n, k, width, *kinds, not transposed, True, algorithm)
            tasks.append((problem, one.buffer.data_ptr(), part.data_ptr(), d + number * out_bytes))
    _run(tasks, alpha, streams, first.device)
    return out


def _out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == E4M3 else dtype


def _check(
    op: str,
    packed: Sequence[Packed24],
    operands: Sequence[torch.Tensor],
    counts: Sequence[int],
    columns: tuple[int, ...],
    total: int,
) -> bool:
    """KernelError unless all fits; whether the library can take the operands as they are."""
    one, first = packed[0], operands[0]
    fits = (
        len(packed) == len(counts)
        and sum(counts) == total
        and all(part.dtype == one.dtype and part.device == first.device for part in operands)
        and first.device == one.values.device
        and first.shape[1:] == (columns or first.shape[1:])
        and all(other.shape[0] == one.shape[0] for other in packed)
    )
    if not fits:
        raise KernelError(
            f"{op}: {len(packed)} packed matrices, {list(counts)} rows of {total}, operands like "
            f"{first.dtype} {tuple(first.shape)} on {first.device}, expected one for each"
        )
    whole = 16 // first.itemsize
    return all(part.is_contiguous() for part in operands) and not any(n % whole for n in counts)


def _run(
    tasks: Sequence[tuple[Problem, int, int, int]],
    alpha: float | None,
    streams: Streams,
    device: torch.device,
) -> None:
    """Problems with the addresses of A, B and D."""
    if not tasks:
        return
    assert alpha is not None
    with torch.cuda.device(device):
        if not streams:
            handle = torch._C._cuda_getCurrentRawStream(device.index)
            for problem, a, b, d in tasks:
                plan(problem, device).launch(a, b, d, alpha, handle)
            return
        current = torch.cuda.current_stream()
        begun = current.record_event()
        handles = [stream.cuda_stream for stream in streams]
        for stream in streams:
            stream.wait_event(begun)
        for number, (problem, a, b, d) in enumerate(tasks):
            plan(problem, device).launch(a, b, d, alpha, handles[number % len(handles)])
        for stream in streams:
            current.wait_event(stream.record_event())
