"""Current scaling (Megatron's "tensorwise"): a tensor's scale follows from its own magnitude.

`scale = 448 / amax`, rounded down to a power of two, is found in a pass before the one that
quantizes. It is known on the device alone, so that no step waits for it. There is no history, and
nothing that a checkpoint would have to keep.

A shard of a tensor-parallel tensor takes the whole's magnitude, the largest over the ranks, so that
every degree computes the same; Transformer Engine reduces only what sequence parallelism gathers
after quantizing, and scales each shard of a weight, of a row-parallel layer's input and of a
column-parallel layer's gradient by itself.
"""

from __future__ import annotations

import functools

import torch

from megasparse.fp8 import transformer_engine
from megasparse.fp8.scale import Largest, Reduce, Scale, assumed_inverse, quantize_by_definition
from megasparse.kernels import scales_of_amax
from megasparse.kernels.float8 import MAXIMUM
from megasparse.kernels.packed24 import E4M3


class CurrentQuantizer:
    """Quantizer of one operand of one layer.

    Args:
        scaling: that it is of.
        reduce_max: largest over the ranks that hold shards of its tensors; None: they are whole.

    Attributes:
        assumed: the inverse scale that products take from the host.
        latest: the inverse scale of the latest tensor, float32 on the device; None: there is none.
    """

    scale_comes_first = False

    def __init__(self, scaling: CurrentScaling, reduce_max: Reduce | None) -> None:
        self.scaling, self._reduce_max = scaling, reduce_max
        self.assumed = 1.0
        self.latest: torch.Tensor | None = None

    def known_scale(self) -> Scale | None:
        """See `Quantizer`: a scale follows from the whole tensor."""
        return None

    def scale_for(
        self,
        x: torch.Tensor,
        headroom: float | torch.Tensor = 1.0,
        dtype: torch.dtype = E4M3,
    ) -> Scale:
        """See `Quantizer`; with shards a collective call."""
        return self.scale_by(lambda: amax_of(x), headroom, dtype)

    def scale_by(
        self,
        largest: Largest,
        headroom: float | torch.Tensor = 1.0,
        dtype: torch.dtype = E4M3,
    ) -> Scale:
        """See `Quantizer`; with shards a collective call."""
        amax = largest()
        if self._reduce_max is not None:
            # What the largest of a NaN and a number is depends on the library.
            amax = self._reduce_max(torch.nan_to_num(amax, nan=float("inf")))
        if isinstance(headroom, torch.Tensor) or headroom != 1.0:
            amax = amax * headroom
        scales = scales_of_amax(amax, maximum=MAXIMUM[dtype], power_of_two=True)
        draw = (scales.draw_scale, scales.draw_scale_inv)
        return self._remembered(scales.scale, scales.scale_inv, draw)

    def scale_for_draws(self, largest: Largest, headroom: float, scale: Scale) -> Scale:
        """See `Quantizer`: by a bound of what a draw keeps."""
        assert scale.draw is not None
        return self._remembered(*scale.draw)

    def saved_with(self, scale: Scale) -> tuple[torch.Tensor, ...]:
        """See `Quantizer`: the scales of this tensor."""
        return (scale.scale, scale.scale_inv)

    def scale_of_saved(self, saved: tuple[torch.Tensor, ...]) -> Scale:
        """See `Quantizer`."""
        return Scale(saved[0], saved[1], self.assumed)

    def quantized(
        self,
        x: torch.Tensor,
        *,
        rows: bool = True,
        columns: bool = False,
        record: bool = True,
        dtype: torch.dtype = E4M3,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Scale]:
        """See `Quantizer`; nothing is recorded."""
        scale = self.scale_for(x, dtype=dtype)
        if not x.is_cuda:
            return *quantize_by_definition(x, scale.scale, rows, columns, dtype), scale
        unused = _unused(x.device)
        quantizer = transformer_engine.make_quantizer(scale.scale, unused, columns, dtype)
        row, transposed = transformer_engine.quantize(x, quantizer, dtype)
        return row if rows else None, transposed, scale

    def assume(self) -> None:
        """Let products assume the scale of the latest tensor; waits for the device."""
        if self.latest is not None:
            self.assumed = assumed_inverse(float(self.latest))

    def _remembered(
        self,
        scale: torch.Tensor,
        scale_inv: torch.Tensor,
        draw: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Scale:
        self.latest = scale_inv
        return Scale(scale, scale_inv, self.assumed, draw=draw)


class CurrentScaling:
    """The quantizers of this rank's part of the model; the counterpart of DelayedScaling.

    Args:
        reduce_max: largest over the tensor-parallel group, in place.
        reduce_experts: largest over the ranks that share a layer's experts, tensor-parallel ones
            too.
    """

    host_follows = False

    def __init__(
        self, reduce_max: Reduce | None = None, reduce_experts: Reduce | None = None
    ) -> None:
        self._reduce_max, self._reduce_experts = reduce_max, reduce_experts
        self._quantizers: list[CurrentQuantizer] = []

    def quantizer(self, sharded: bool = True, of_experts: bool = False) -> CurrentQuantizer:
        """A new one.

        Args:
            sharded: over the tensor-parallel group, along any dimension.
            of_experts: its tensors are weights of a layer's experts.
        """
        reduce = self._reduce_max if sharded else None
        reduce = self._reduce_experts if of_experts else reduce
        self._quantizers.append(CurrentQuantizer(self, reduce))
        return self._quantizers[-1]

    def allocate(self) -> None:
        """Nothing lasts."""

    def finish_step(self) -> None:
        """Nothing is carried over."""

    def assume(self) -> None:
        """Let products assume the scales of the latest tensors; waits for the device."""
        for one in self._quantizers:
            one.assume()

    def share_assumed(self) -> float:
        """Share of the quantizers whose latest scale is the assumed one; waits for the device."""
        pairs = [(q.assumed, q.latest) for q in self._quantizers if q.latest is not None]
        same = sum(assumed_inverse(float(latest)) == assumed for assumed, latest in pairs)
        return same / len(pairs) if pairs else 1.0

    def snapshot(self) -> list[torch.Tensor | None]:
        """What a step may change, for `restore`: which scales are the latest."""
        return [one.latest for one in self._quantizers]

    def restore(self, snapshot: list[torch.Tensor | None]) -> None:
        """Put back what `snapshot` gave."""
        for one, latest in zip(self._quantizers, snapshot, strict=True):
            one.latest = latest

    def export_state(self, quantizers: object) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: nothing."""
        return {}

    def import_state(self, quantizers: object, state: dict[str, torch.Tensor]) -> None:
        """Nothing is taken over, of delayed scaling neither."""


@functools.cache
def _unused(device: torch.device) -> torch.Tensor:
    """What Transformer Engine raises while it quantizes by a scale that is known already."""
    return torch.zeros(1, dtype=torch.float32, device=device)


def amax_of(x: torch.Tensor) -> torch.Tensor:
    """float32 (1,): the largest magnitude of a tensor, without waiting for the device."""
    if not x.is_cuda:
        return x.detach().float().abs().amax().reshape(1)
    amax = torch.zeros(1, dtype=torch.float32, device=x.device)
    transformer_engine.raise_amax(x, amax)
    return amax
