"""2:4 operands that cuSPARSELt packs itself, for GPUs whose packed layout our kernels do not write.

The library compresses a dense matrix that is 2:4 already: it costs a pass over the matrix beside
the one that prunes it. What is in the buffer is the library's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megasparse.errors import KernelError
from megasparse.kernels.packed24 import unit_scale


@dataclass(frozen=True, eq=False)
class LibraryPacked24:
    """A 2:4 matrix (N, K) in 16 bits, as it is and as the library has packed it.

    values: (N, K), dense with its zeros.
    buffer: (bytes,) uint8, what cuSPARSELt takes; on a CPU empty.
    """

    values: torch.Tensor
    buffer: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 or float16."""
        return self.values.dtype

    @property
    def scale(self) -> torch.Tensor:
        """0-d float32: 1."""
        return unit_scale(self.values.device)

    def dense(self) -> torch.Tensor:
        """The (N, K) matrix."""
        return self.values

    stored = dense


@torch.no_grad()
def pack24_by_library(w: torch.Tensor, out: LibraryPacked24 | None = None) -> LibraryPacked24:
    """Pack a matrix that is 2:4 along its rows, with cuSPARSELt's own compression.

    Args:
        w: (N, K) contiguous, bfloat16 or float16, at most 2 of each 4 not 0 (not checked). Kept.
        out: of the same shape and dtype: its buffer gets the result.

    Raises: KernelError for other dtypes or layouts, or where the library cannot pack.
    """
    if w.dtype not in (torch.bfloat16, torch.float16) or w.dim() != 2 or not w.is_contiguous():
        raise KernelError(
            f"pack24_by_library: w is {w.dtype} of shape {tuple(w.shape)}, strides {w.stride()}, "
            "expected a contiguous matrix in 16 bits"
        )
    if not w.is_cuda:
        return LibraryPacked24(w, torch.empty(0, dtype=torch.uint8))
    try:
        buffer = torch._cslt_compress(w).view(torch.uint8).reshape(-1)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise KernelError(
            f"pack24_by_library: cuSPARSELt cannot pack {w.dtype}: {reason}"
        ) from None
    return LibraryPacked24(w, buffer if out is None else out.buffer.copy_(buffer))
