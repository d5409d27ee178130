"""Delayed scaling: scales follow from the largest magnitudes of earlier steps.

One pass over a tensor is enough then, and the kernel that computes a tensor can quantize it. The
quantizers of a model lie side by side and are updated together, once an optimizer step. It is
Transformer Engine's delayed scaling, with scales rounded down to powers of two (`scale.py` says
why), and raised only where a scale four times as large would do: so magnitudes that move a little
around a power of two leave the scale as it is, and products find the factor that they assume. That
costs two of the 18 powers of two that e4m3 spans, at most. Without Transformer Engine (CPU) the
same is computed in plain torch, which is the definition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from megasparse.fp8 import transformer_engine
from megasparse.fp8.scale import (
    Largest,
    Reduce,
    Scale,
    assumed_inverse,
    power_of_two_,
    quantize_by_definition,
)
from megasparse.fp8.transformer_engine import AmaxAlgorithm
from megasparse.kernels.packed24 import E4M3, E4M3_MAX

_FLOAT32_MAX = torch.finfo(torch.float32).max
# A scale is raised where this multiple of it would do; it is lowered as soon as it must be.
RAISED_BY = 4.0


@dataclass
class DelayedQuantizer:
    """Quantizer of one operand of one layer.

    Attributes:
        index: its place in `scaling`.
        scale, scale_inv: float32 0-d on the device, of this step.
        amax: float32 (1,) on the device, raised to the largest magnitude seen in this step.
    """

    scale_comes_first: ClassVar[bool] = True

    scaling: DelayedScaling
    index: int
    scale: torch.Tensor = field(init=False)
    scale_inv: torch.Tensor = field(init=False)
    amax: torch.Tensor = field(init=False)
    _quantizers: dict[tuple[bool, bool, torch.dtype], Any] = field(default_factory=dict)

    @property
    def initialized(self) -> bool:
        """Whether it has a scale, which its first use gives it."""
        return self.scaling.initialized[self.index]

    def known_scale(self) -> Scale | None:
        """See `Quantizer`."""
        return self._scale() if self.initialized else None

    def scale_for(
        self,
        x: torch.Tensor,
        headroom: float | torch.Tensor = 1.0,
        dtype: torch.dtype = E4M3,
    ) -> Scale:
        """See `Quantizer`. The very first is of the tensor itself, and waits for the device."""
        return self.scale_by(lambda: x.detach().abs().amax().float().reshape(1), headroom)

    def scale_by(
        self,
        largest: Largest,
        headroom: float | torch.Tensor = 1.0,
        dtype: torch.dtype = E4M3,
    ) -> Scale:
        """See `Quantizer`. The magnitude is computed the very first time alone."""
        if not self.initialized:
            self.scaling.set_from(self.index, largest() * headroom)
        return self._scale()

    def scale_for_draws(self, largest: Largest, headroom: float, scale: Scale) -> Scale:
        """See `Quantizer`."""
        return self.scale_by(largest, headroom)

    def saved_with(self, scale: Scale) -> tuple[torch.Tensor, ...]:
        """See `Quantizer`: nothing, since scales stay for the whole step."""
        return ()

    def scale_of_saved(self, saved: tuple[torch.Tensor, ...]) -> Scale:
        """See `Quantizer`."""
        return self._scale()

    def quantized(
        self,
        x: torch.Tensor,
        *,
        rows: bool = True,
        columns: bool = False,
        record: bool = True,
        dtype: torch.dtype = E4M3,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Scale]:
        """See `Quantizer`. On a GPU there is no pass for columns alone."""
        scale = self.scale_for(x)
        if not x.is_cuda:
            if record:
                self.amax.copy_(torch.maximum(self.amax, x.detach().float().abs().amax()))
            return *quantize_by_definition(x, self.scale, rows, columns, dtype), scale
        key = (columns, record, dtype)
        quantizer = self._quantizers.get(key)
        if quantizer is None:
            amax = self.amax if record else torch.zeros_like(self.amax)
            quantizer = transformer_engine.make_quantizer(self.scale, amax, columns, dtype)
            self._quantizers[key] = quantizer
        row, transposed = transformer_engine.quantize(x, quantizer, dtype)
        return row if rows else None, transposed, scale

    def _scale(self) -> Scale:
        scaling = self.scaling
        assumed = scaling.assumed[self.index]
        return Scale(self.scale, self.scale_inv, assumed, scaling.host_follows, self.amax)


class DelayedScaling:
    """The quantizers of this rank's part of the model.

    Args:
        device: of the tensors.
        history_length: steps whose largest magnitudes count (Megatron: fp8_amax_history_len).
        algorithm: the largest of them, or the newest (fp8_amax_compute_algo).
        margin: scales are divided by 2 ** margin.
        reduce_max: largest over the ranks that compute the same layers, in place.

    Attributes:
        assumed: the inverse scales that products take from the host.
        host_follows: whether `assumed` is read anew after every step, which waits for the device;
            captured steps keep what they were captured with.
        initialized: which quantizers have been used.
    """

    def __init__(
        self,
        device: torch.device,
        history_length: int = 16,
        algorithm: AmaxAlgorithm = "max",
        margin: int = 0,
        reduce_max: Reduce | None = None,
    ) -> None:
        self._device, self._length = device, history_length
        self._algorithm, self._margin = algorithm, margin
        self._reduce_max = reduce_max or (lambda tensor: tensor)
        self._quantizers: list[DelayedQuantizer] = []
        self.assumed: list[float] = []
        self.initialized: list[bool] = []
        self.host_follows = True

    def quantizer(self, sharded: bool = True, of_experts: bool = False) -> DelayedQuantizer:
        """A new one; before `allocate`. Whether its tensors are shards does not matter here: the
        magnitudes of all are reduced together."""
        self._quantizers.append(DelayedQuantizer(self, len(self._quantizers)))
        return self._quantizers[-1]

    def allocate(self) -> None:
        """Make the tensors of all quantizers."""
        count = len(self._quantizers)
        self.scale = torch.ones(count, dtype=torch.float32, device=self._device)
        # Each in 16 bytes of its own: cuBLAS takes no scale at another address.
        self._scale_inv = torch.ones(count, 4, dtype=torch.float32, device=self._device)
        self.scale_inv = self._scale_inv[:, 0]
        # Row 0 takes the magnitudes of the step that is under way (as in Transformer Engine).
        self.history = torch.zeros(self._length, count, dtype=torch.float32, device=self._device)
        for one in self._quantizers:
            one.scale, one.scale_inv = self.scale[one.index], self.scale_inv[one.index]
            one.amax = self.history[0, one.index : one.index + 1]
        self.assumed, self.initialized = [1.0] * count, [False] * count

    def set_from(self, index: int, amax: torch.Tensor) -> None:
        """The first scale of a quantizer, from the magnitude of what is about to be quantized."""
        value = float(self._reduce_max(amax))
        usable = 0.0 < value < float("inf")  # else a scale of 1, until the next step knows better
        self.scale[index] = min(E4M3_MAX / value, _FLOAT32_MAX) if usable else 1.0
        power_of_two_(self.scale[index : index + 1])
        self.scale_inv[index] = self.scale[index].reciprocal()
        self.assumed[index] = assumed_inverse(float(self.scale_inv[index]))
        self.initialized[index] = True

    def finish_step(self) -> None:
        """Scales of the next step from the magnitudes of this one; a collective call."""
        if not self._quantizers:
            return
        newest = self.history[0]
        # A NaN or an infinity says nothing about magnitudes.
        newest = torch.where(torch.isfinite(newest), newest, torch.zeros_like(newest))
        newest = self._reduce_max(newest)
        self.history[0] = newest
        on_gpu = transformer_engine.is_there() and newest.is_cuda
        update = transformer_engine.update_delayed if on_gpu else update_by_definition
        before = self.scale.clone()
        update(newest, self.history, self.scale, self._algorithm, self._margin)
        keep_or_round_(self.scale, before)
        self.scale_inv.copy_(self.scale.reciprocal())
        if self.host_follows:
            self.assume()

    def assume(self) -> None:
        """Let products assume the scales of now; waits for the device."""
        self.assumed = [assumed_inverse(value) for value in self.scale_inv.tolist()]

    def share_assumed(self) -> float:
        """Share of the used quantizers whose scale is the assumed one; waits for the device."""
        now = self.scale_inv.tolist()
        used = [i for i, known in enumerate(self.initialized) if known]
        same = sum(assumed_inverse(now[i]) == self.assumed[i] for i in used)
        return same / len(used) if used else 1.0

    def snapshot(self) -> tuple[Any, ...]:
        """What a step may change before `finish_step`, for `restore`: magnitudes, first scales."""
        if not self._quantizers:
            return ()
        known = all(self.initialized)  # then the step leaves scales as they are
        scales = None if known else (self.scale.clone(), self.scale_inv.clone())
        return (self.history[0].clone(), scales, list(self.initialized))

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Put back what `snapshot` gave, where it is in memory."""
        if not snapshot:
            return
        newest, scales, self.initialized = snapshot[0], snapshot[1], list(snapshot[2])
        self.history[0] = newest
        if scales is not None:
            self.scale.copy_(scales[0])
            self.scale_inv.copy_(scales[1])
        if self.host_follows:
            self.assume()

    def export_state(self, quantizers: tuple[DelayedQuantizer, ...]) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of some: scales (n,), histories (length, n), and which have been
        used, uint8 (n,): a recipe without MVUE, or a dense phase, does not use all."""
        index = [one.index for one in quantizers]
        return {
            "fp8_scale": self.scale[index].clone(),
            "fp8_history": self.history[:, index].clone(),
            "fp8_known": torch.tensor([self.initialized[i] for i in index], dtype=torch.uint8),
        }

    def import_state(
        self, quantizers: tuple[DelayedQuantizer, ...], state: dict[str, torch.Tensor]
    ) -> None:
        """Take over what `export_state` gave; of a longer history the newest steps."""
        if "fp8_scale" not in state:
            return
        index = [one.index for one in quantizers]
        self.scale[index] = power_of_two_(state["fp8_scale"].to(self._device).clone())
        self.scale_inv.copy_(self.scale.reciprocal())
        history = state["fp8_history"].to(self._device)
        # Row 0 is of the step under way, rows 1 and on of the past, the newest last.
        past = min(history.shape[0], self._length) - 1
        self.history[:, index] = 0.0
        if past:
            self.history[-past:, index] = history[-past:]
        known = state["fp8_known"].tolist()
        for i, value, used in zip(index, self.scale_inv[index].tolist(), known, strict=True):
            self.assumed[i], self.initialized[i] = assumed_inverse(value), bool(used)


def keep_or_round_(scale: torch.Tensor, before: torch.Tensor) -> None:
    """Round scales down to powers of two, and leave those as before that need not change; in place.

    Args:
        scale: (n,) float32, the largest that do.
        before: of the step that was.
    """
    power_of_two_(scale)
    stays = (before <= scale) & (scale < RAISED_BY * before)
    scale.copy_(torch.where(stays, before, scale))


def update_by_definition(
    newest: torch.Tensor,
    history: torch.Tensor,
    scale: torch.Tensor,
    algorithm: AmaxAlgorithm,
    margin: int,
) -> None:
    """Transformer Engine's delayed scaling: `scale = 448 / amax / 2 ** margin`, in place.

    Args:
        newest: (n,) largest magnitudes of the step; 0 leaves a scale as it was.
        history: (length, n); shifted by one row.
        scale: (n,) float32.
    """
    history[0] = newest
    amax = history.amax(0) if algorithm == "max" else newest
    history.copy_(torch.where(newest > 0, history.roll(-1, 0), history))
    history[0] = 0.0
    new = (E4M3_MAX / amax / 2.0**margin).clamp(max=_FLOAT32_MAX)
    scale.copy_(torch.where(newest > 0, new, scale))
