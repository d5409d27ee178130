"""Scales of the moment (Megatron's "tensorwise", Transformer Engine's current scaling).

A tensor's scale follows from its own largest magnitude, `scale = 448 / amax`, found in a pass
before the one that quantises. It is known on the device alone, so that no step waits: products are
made without it and multiplied by `inverse` of both operands afterwards. There is no history, and
nothing that a checkpoint would have to keep.

What is quantised on its own is quantised by Transformer Engine's Float8CurrentScalingQuantizer. A
shard of a tensor-parallel tensor takes the whole's magnitude, the largest over the ranks, so that
every degree computes the same; Transformer Engine reduces only what sequence parallelism gathers
after quantising, and scales each shard of a weight, of a row-parallel layer's input and of a
column-parallel layer's gradient by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megasparse.fp8 import delayed
from megasparse.kernels import AmaxScales, scales_of_amax
from megasparse.kernels.float8 import MAXIMUM
from megasparse.kernels.packed24 import E4M3


@dataclass(frozen=True)
class CurrentScaling:
    """How one tensor was scaled.

    Attributes:
        inverse: float32 0-d on the device, 1 / scale.
        scales: with those of MVUE draws; None where Transformer Engine has computed the scale.
        factor: 1 / scale on the host: unknown there.
        amax: where a kernel would raise the largest magnitude for later steps: nowhere.
    """

    inverse: torch.Tensor
    scales: AmaxScales | None = None
    factor: None = None
    amax: None = None

    @property
    def scale(self) -> torch.Tensor:
        """Float32 0-d on the device, the multiplier."""
        return self.inverse.reciprocal() if self.scales is None else self.scales.scale

    def kept_with(self) -> tuple[torch.Tensor, ...]:
        """What has to be kept beside the operand until its last GEMM."""
        return (self.inverse,)


class CurrentSlot:
    """One operand of one layer.

    Args:
        scales: whose it is.
        reduce_max: largest over the ranks that hold shards of its tensors; None: they are whole.
    """

    def __init__(self, scales: CurrentScales, reduce_max: delayed.Reduce | None) -> None:
        self.scales, self._reduce_max = scales, reduce_max

    def begin(
        self,
        x: torch.Tensor,
        headroom: float | torch.Tensor = 1.0,
        dtype: torch.dtype = E4M3,
    ) -> CurrentScaling:
        """The scaling of x; with shards a collective call.

        Args:
            headroom: how much larger than x what is to be quantised may be.
            dtype: of the copy.
        """
        amax = self._amax(x)
        if isinstance(headroom, torch.Tensor) or headroom != 1.0:
            amax = amax * headroom
        scales = scales_of_amax(amax, maximum=MAXIMUM[dtype])
        return CurrentScaling(scales.scale_inv, scales)

    def begin_draws(self, x: torch.Tensor, headroom: float, scaling: object) -> CurrentScaling:
        """The scaling of MVUE draws from an x that `scaling` is of: by a bound of what is kept."""
        assert isinstance(scaling, CurrentScaling) and scaling.scales is not None
        scales = scaling.scales
        mine = AmaxScales(scales.draw_scale, scales.draw_scale_inv, *scales[2:])
        return CurrentScaling(scales.draw_scale_inv, mine)

    def of_kept(self, kept: tuple[torch.Tensor, ...]) -> CurrentScaling:
        """The scaling of an operand that was kept with `kept`."""
        return CurrentScaling(kept[0])

    def quantised(
        self, x: torch.Tensor, *, rows: bool = True, columns: bool = False, record: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, CurrentScaling]:
        """x (T, K) as e4m3: row-major (T, K), and transposed (K, T), and its scaling.

        Args:
            rows, columns: which of the two are wanted; the others are None.
            record: of delayed scaling; nothing is recorded here.
        """
        if x.is_cuda and self._reduce_max is None:
            row, column, inverse = delayed.quantise_by_own_amax(x, columns)
            scaling = CurrentScaling(inverse)
        else:
            scaling = self.begin(x)
            row, column = delayed.quantise_at(x, scaling.scale, columns)
        return row if rows else None, column, scaling

    def _amax(self, x: torch.Tensor) -> torch.Tensor:
        amax = delayed.amax_of(x)
        if self._reduce_max is None:
            return amax
        # What the largest of a NaN and a number is depends on the library.
        return self._reduce_max(torch.nan_to_num(amax, nan=float("inf")))


class CurrentScales:
    """The slots of this rank's part of the model; the counterpart of Fp8Scales.

    Args:
        reduce_max: largest over the tensor-parallel group, in place.
    """

    def __init__(self, reduce_max: delayed.Reduce | None = None) -> None:
        self._reduce_max = reduce_max

    def slot(self, sharded: bool = True) -> CurrentSlot:
        """A new slot.

        Args:
            sharded: over the tensor-parallel group, along any dimension.
        """
        return CurrentSlot(self, self._reduce_max if sharded else None)

    def allocate(self) -> None:
        """Nothing lasts."""

    def finish_step(self) -> None:
        """Nothing is carried over."""


Scales = delayed.Fp8Scales | CurrentScales
Slot = delayed.Fp8Slot | CurrentSlot
Scaling = delayed.Fp8Slot | CurrentScaling
