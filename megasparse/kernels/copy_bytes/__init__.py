"""A copy that multiprocessors make, also out of the memory of another GPU."""

from __future__ import annotations

import torch

from megasparse.errors import KernelError
from megasparse.kernels import dispatch
from megasparse.kernels.copy_bytes import reference, triton


@torch.no_grad()
def copy_bytes_(
    out: torch.Tensor, source: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Copy `source` to `out`; returns `out`.

    In a CUDA graph torch's copy becomes a node for a copy engine, which begins late after a kernel.

    Args:
        out, source: contiguous, of one shape and dtype; the GPU can read both.
        backend: None, "reference" or "triton".

    Raises: KernelError for other shapes, dtypes, devices or layouts, or a backend that cannot run.
    """
    same = (out.shape, out.dtype, out.device) == (source.shape, source.dtype, source.device)
    if not same or not (out.is_contiguous() and source.is_contiguous()):
        raise KernelError(
            f"copy_bytes_: source is {source.dtype} {tuple(source.shape)} on {source.device}, "
            f"strides {source.stride()}, out {out.dtype} {tuple(out.shape)} on {out.device}, "
            f"strides {out.stride()}, expected the same, contiguous"
        )
    run = dispatch.implementation(
        "copy_bytes_", out, backend, reference=_by_definition, triton=triton.copy_bytes_
    )
    with torch.cuda.device_of(out):
        run(out, source)
    return out


def _by_definition(out: torch.Tensor, source: torch.Tensor) -> None:
    out.copy_(reference.copied(source))
