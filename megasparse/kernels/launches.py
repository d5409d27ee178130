"""How kernels are launched: their parameters, and groups of 4 as the integers that they load."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megasparse.kernels import dispatch

# What kernels and the functions in `device/` call the entries.
KINDS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "e4m3",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class Launch:
    """Work items (whatever the kernel counts) and warps per Triton program."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class Tile:
    """A tile of `rows` x `columns` a program, and its warps."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class Launches:
    """A kernel's launch parameters on a GPU, for 32-bit entries and for narrower ones.

    A group of 4 is 16 bytes at 32 bits, the widest load; where a 1-byte mask is written as well,
    one group a thread avoids a change of layout. Narrower groups want two or more a thread.
    """

    wide: Launch
    narrow: Launch

    def pick(self, w: torch.Tensor) -> Launch:
        """The launch for `w`; in the interpreter, whose cost is per program, a large one."""
        if dispatch.INTERPRETING:
            return Launch(1 << 12, 4)
        return self.wide if w.itemsize == 4 else self.narrow


def group_words(w: torch.Tensor) -> torch.Tensor:
    """`w` as flat integers, for kernels: a group of 4 is two int64 (32-bit entries), one int64
    (16-bit) or one int32 (8-bit).

    `w`'s size is a multiple of 4. Shares memory with `w` when that is contiguous and starts on a
    boundary of such an integer; otherwise it is a copy.
    """
    word = torch.int32 if w.element_size() == 1 else torch.int64
    flat = w.contiguous().view(-1)
    if flat.data_ptr() % word.itemsize or flat.storage_offset() % (word.itemsize // w.itemsize):
        flat = flat.clone()
    return flat.view(word)
