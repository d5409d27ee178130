"""What `grad_pack24` and `activation_grad_pack24` share: how a gradient is quantized."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megasparse.errors import KernelError
from megasparse.kernels.checks import require, require_if, set_flag
from megasparse.kernels.float8 import MAXIMUM, raise_amax, whole_tiles
from megasparse.kernels.mvue_pack24 import Channels, check_channels
from megasparse.kernels.packed24 import E4M3, Packed24, empty_packed

DTYPES = (torch.bfloat16, torch.float16)


class Quantization(NamedTuple):
    """Arguments of `grad_pack24`, which describes them."""

    row_scale: torch.Tensor | None
    row_dtype: torch.dtype | None
    packed_scale: torch.Tensor
    row_amax: torch.Tensor | None
    packed_amax: torch.Tensor | None
    error_flag: torch.Tensor | None
    sums: torch.Tensor | None = None

    def check(self, op: str, device: torch.device) -> None:
        """KernelError when one is missing, superfluous, or of another kind."""
        if self.row_dtype is not None and self.row_dtype not in MAXIMUM:
            raise KernelError(
                f"{op}: row_dtype is {self.row_dtype}, expected float8_e5m2, float8_e4m3fn or None"
            )
        when = "without row_dtype" if self.row_dtype is None else f"for {self.row_dtype}"
        require_if(self.row_dtype is not None, op, "row_scale", self.row_scale, when)
        require(op, "row_scale", self.row_scale, torch.float32, (), device)
        require_if(True, op, "packed_scale", self.packed_scale, "always")
        require(op, "packed_scale", self.packed_scale, torch.float32, (), device)
        require(op, "row_amax", self.row_amax, torch.float32, (1,), device)
        require(op, "packed_amax", self.packed_amax, torch.float32, (1,), device)
        require(op, "error_flag", self.error_flag, torch.int32, (1,), device)

    def record(self, amax: torch.Tensor, draw_amax: torch.Tensor, crowded: torch.Tensor) -> None:
        """What a definition found of dz and its draws (0-d), to where the caller wants it."""
        raise_amax(self.row_amax, amax)
        raise_amax(self.packed_amax, draw_amax)
        set_flag(self.error_flag, crowded)

    def new_outputs(
        self, dz: torch.Tensor, row_tokens: int
    ) -> tuple[torch.Tensor | None, Packed24, torch.Tensor]:
        """Memory for what becomes of a dz (T, N): rows, packed, and a flag where none is given."""
        tokens, width = dz.shape
        row = None
        if self.row_dtype is not None:
            row = torch.empty((row_tokens, width), dtype=self.row_dtype, device=dz.device)
        scale_inv = torch.empty((), dtype=torch.float32, device=dz.device)
        packed = empty_packed((width, whole_tiles(tokens)), E4M3, scale_inv, dz.device)
        flag = self.error_flag
        if flag is None:
            flag = torch.zeros(1, dtype=torch.int32, device=dz.device)
        return row, packed, flag

    def new_sums(self, tiles: int, width: int) -> torch.Tensor | None:
        """Memory for the sums over the tokens of each tile, where sums are wanted."""
        return None if self.sums is None else self.sums.new_empty(tiles, width)

    def add_sums(self, of_tiles: torch.Tensor | None) -> None:
        """Their sum, to where the caller wants it."""
        if of_tiles is not None:
            torch.sum(of_tiles, 0, out=self.sums)


def check_gradient(op: str, dz: torch.Tensor, channels: Channels) -> None:
    """KernelError when dz's shape, its format or its sections do not fit."""
    if dz.dim() != 2 or dz.dtype not in DTYPES or not dz.shape[0]:
        raise KernelError(
            f"{op}: dz is {dz.dtype} of shape {tuple(dz.shape)}, expected 16 bits, (T, N)"
        )
    check_channels(op, dz.shape[1], channels)
