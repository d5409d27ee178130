"""8-bit floating point: Transformer Engine's quantisers and delayed scaling; the door to it.

A tensor is quantised with a scale that follows from the largest magnitudes of earlier steps
("delayed scaling"), so one pass over it is enough, and the scale is known on the host before the
step begins: the sparse GEMM library takes factors from there. All slots of a model lie side by side
and are updated together, once an optimizer step. (Scales of the moment: `fp8/current.py`.)

Without Transformer Engine (CPU) the same is computed in plain torch, which is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megasparse.kernels.float8 import quantize as definition
from megasparse.kernels.packed24 import E4M3, E4M3_MAX

try:  # not only ImportError: without a GPU, or with a broken cuDNN, it raises others
    import transformer_engine.pytorch  # noqa: F401  (loads the library)
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import (
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
    )

    _missing: str | None = None
except Exception as error:
    tex = Float8Quantizer = Float8CurrentScalingQuantizer = None
    _missing = " ".join(f"{type(error).__name__}: {error}".split())

Reduce = Callable[[torch.Tensor], torch.Tensor]
AmaxAlgorithm = Literal["max", "most_recent"]
_FLOAT32_MAX = torch.finfo(torch.float32).max


def refusal(device: torch.device) -> str | None:
    """Why FP8 GEMMs cannot run on a device, or None when they can."""
    if device.type != "cuda":
        return f"the run is on {device.type}, expected a GPU"
    if _missing is not None:
        return f"Transformer Engine cannot be imported ({_missing})"
    if torch.cuda.get_device_capability(device)[0] < 9:
        return f"{torch.cuda.get_device_name(device)} has no FP8 tensor cores, expected Hopper"
    return None


@dataclass
class Fp8Slot:
    """Scaling of one operand of one layer.

    Attributes:
        index: its place in `scales`.
        scale: float32 0-d on the device, the multiplier q = x * scale of this step.
        inverse: float32 0-d on the device, 1 / scale.
        amax: float32 (1,) on the device, raised to the largest magnitude seen in this step.
    """

    scales: Fp8Scales
    index: int
    scale: torch.Tensor = field(init=False)
    inverse: torch.Tensor = field(init=False)
    amax: torch.Tensor = field(init=False)
    _quantisers: dict[tuple[bool, bool], Any] = field(default_factory=dict)

    @property
    def factor(self) -> float:
        """1 / scale on the host: what undoes the scaling in a product."""
        return 1.0 / self.scales.on_host[self.index]

    @property
    def known(self) -> bool:
        """Whether it has a scale, which its first use gives it."""
        return self.scales.known[self.index]

    def begin(
        self,
        x: torch.Tensor,
        headroom: float | torch.Tensor = 1.0,
        dtype: torch.dtype = E4M3,
    ) -> Fp8Slot:
        """At the very first use: a scale from the tensor itself. Waits for the device once.

        Args:
            headroom: how much larger than x what is to be quantised may be.
            dtype: of the copy, which delayed scaling does not depend on.

        Returns: itself, the scaling of x.
        """
        if not self.known:
            self.scales.set_from(self.index, x, headroom)
        return self

    def begin_draws(self, x: torch.Tensor, headroom: float, scaling: object) -> Fp8Slot:
        """`begin` for MVUE draws from an x, whose own `scaling` is known."""
        return self.begin(x, headroom)

    def kept_with(self) -> tuple[torch.Tensor, ...]:
        """What has to be kept beside an operand until its last GEMM: nothing, scales stay."""
        return ()

    def of_kept(self, kept: tuple[torch.Tensor, ...]) -> Fp8Slot:
        """The scaling of an operand that was kept with `kept`."""
        return self

    def quantised(
        self, x: torch.Tensor, *, rows: bool = True, columns: bool = False, record: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Fp8Slot]:
        """`begin` and `quantise`, with the scaling that was used."""
        self.begin(x)
        return *self.quantise(x, rows=rows, columns=columns, record=record), self

    def quantise(
        self, x: torch.Tensor, *, rows: bool = True, columns: bool = False, record: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """x (T, K) as e4m3: row-major (T, K), and transposed (K, T), in one pass.

        Args:
            x: 16-bit or float32.
            rows, columns: which of the two are wanted; the others are None (on a GPU there is no
                pass for columns alone).
            record: raise `amax`.
        """
        if not x.is_cuda:
            if record:
                self.amax.copy_(torch.maximum(self.amax, x.detach().float().abs().amax()))
            whole = definition(x, self.scale, E4M3)
            return whole if rows else None, whole.t().contiguous() if columns else None
        quantiser = self._quantisers.get((columns, record))
        if quantiser is None:
            quantiser = self._quantisers[columns, record] = Float8Quantizer(
                self.scale.view(1),
                self.amax if record else torch.zeros_like(self.amax),
                tex.DType.kFloat8E4M3,
                rowwise=True,
                columnwise=columns,
            )
        result = tex.quantize(x.contiguous(), quantiser)
        return (
            result._data.view(E4M3) if rows else None,
            result._transpose.view(E4M3) if columns else None,
        )


def amax_of(x: torch.Tensor) -> torch.Tensor:
    """Float32 (1,): the largest magnitude of a tensor, without waiting for the device."""
    if not x.is_cuda:
        return x.detach().float().abs().amax().reshape(1)
    amax = torch.zeros(1, dtype=torch.float32, device=x.device)
    tex.compute_amax(x.detach().contiguous(), amax)
    return amax


def quantise_at(
    x: torch.Tensor, scale: torch.Tensor, columns: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (T, K) as e4m3 with a given scale (0-d, on its device); with `columns` (K, T) too."""
    if not x.is_cuda:
        whole = definition(x.detach(), scale, E4M3)
        return whole, whole.t().contiguous() if columns else None
    quantiser = Float8Quantizer(
        scale.view(1),
        torch.zeros(1, dtype=torch.float32, device=x.device),
        tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=columns,
    )
    result = tex.quantize(x.detach().contiguous(), quantiser)
    return result._data.view(E4M3), result._transpose.view(E4M3) if columns else None


def quantise_by_own_amax(
    x: torch.Tensor, columns: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Transformer Engine's current scaling of a GPU's x (T, K): as `quantise_at`, and 1 / scale."""
    quantiser = Float8CurrentScalingQuantizer(
        tex.DType.kFloat8E4M3, x.device, rowwise=True, columnwise=columns
    )
    result = tex.quantize(x.detach().contiguous(), quantiser)
    transposed = result._transpose.view(E4M3) if columns else None
    return result._data.view(E4M3), transposed, result._scale_inv.view(())


class Fp8Scales:
    """All slots of this rank's part of the model.

    Args:
        device: of the tensors.
        history_length: steps whose largest magnitudes count (Megatron: fp8_amax_history_len).
        algorithm: the largest of them, or the newest (fp8_amax_compute_algo).
        margin: scales are divided by 2 ** margin.
        reduce_max: largest over the ranks that compute the same layers, in place.

    Attributes:
        on_host: the scales of this step.
        known: which slots have been used.
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
        self._slots: list[Fp8Slot] = []
        self.on_host: list[float] = []
        self.known: list[bool] = []

    def slot(self, sharded: bool = True) -> Fp8Slot:
        """A new slot; before `allocate`. Whether its tensors are shards does not matter here: the
        magnitudes of all slots are reduced together."""
        self._slots.append(Fp8Slot(self, len(self._slots)))
        return self._slots[-1]

    def allocate(self) -> None:
        """Make the tensors of all slots."""
        count = len(self._slots)
        self.scale = torch.ones(count, dtype=torch.float32, device=self._device)
        # Each in 16 bytes of its own: cuBLAS takes no scale at another address.
        self._inverse = torch.ones(count, 4, dtype=torch.float32, device=self._device)
        self.inverse = self._inverse[:, 0]
        # Row 0 takes the magnitudes of the step that is under way (as in Transformer Engine).
        self.history = torch.zeros(self._length, count, dtype=torch.float32, device=self._device)
        for slot in self._slots:
            slot.scale, slot.inverse = self.scale[slot.index], self.inverse[slot.index]
            slot.amax = self.history[0, slot.index : slot.index + 1]
        self.on_host, self.known = [1.0] * count, [False] * count

    def set_from(self, index: int, x: torch.Tensor, headroom: float | torch.Tensor) -> None:
        """The first scale of a slot, from the tensor that is about to be quantised."""
        amax = x.detach().abs().amax().float().reshape(1) * headroom
        value = float(self._reduce_max(amax))
        usable = 0.0 < value < float("inf")  # else a scale of 1, until the next step knows better
        self.on_host[index] = E4M3_MAX / value if usable else 1.0
        self.scale[index] = self.on_host[index]
        self.inverse[index] = 1.0 / self.scale[index]
        self.on_host[index] = float(self.scale[index])  # as float32 has it
        self.known[index] = True

    def finish_step(self) -> None:
        """Scales of the next step from the magnitudes of this one; a collective call."""
        if not self._slots:
            return
        newest = self.history[0]
        # A NaN or an infinity says nothing about magnitudes.
        newest = torch.where(torch.isfinite(newest), newest, torch.zeros_like(newest))
        newest = self._reduce_max(newest)
        self.history[0] = newest
        update = update_by_definition if tex is None or not newest.is_cuda else _update
        update(newest, self.history, self.scale, self._algorithm, self._margin)
        self.inverse.copy_(self.scale.reciprocal())
        self.on_host = self.scale.tolist()

    def export_state(self, slots: tuple[Fp8Slot, ...]) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of some slots: scales (n,), histories (length, n), and which
        have been used, uint8 (n,): a recipe without MVUE, or a dense phase, does not use all."""
        index = [slot.index for slot in slots]
        return {
            "fp8_scale": self.scale[index].clone(),
            "fp8_history": self.history[:, index].clone(),
            "fp8_known": torch.tensor([self.known[i] for i in index], dtype=torch.uint8),
        }

    def import_state(self, slots: tuple[Fp8Slot, ...], state: dict[str, torch.Tensor]) -> None:
        """Take over what `export_state` gave; of a longer history the newest steps."""
        if "fp8_scale" not in state:
            return
        index = [slot.index for slot in slots]
        self.scale[index] = state["fp8_scale"].to(self._device)
        self.inverse.copy_(self.scale.reciprocal())
        history = state["fp8_history"].to(self._device)
        # Row 0 is of the step under way, rows 1 and on of the past, the newest last.
        past = min(history.shape[0], self._length) - 1
        self.history[:, index] = 0.0
        if past:
            self.history[-past:, index] = history[-past:]
        known = state["fp8_known"].tolist()
        for i, value, used in zip(index, self.scale[index].tolist(), known, strict=True):
            self.on_host[i], self.known[i] = value, bool(used)


def update_by_definition(
    newest: torch.Tensor,
    history: torch.Tensor,
    scale: torch.Tensor,
    algorithm: AmaxAlgorithm,
    margin: int,
) -> None:
    """Transformer Engine's delayed scaling: `scale = 448 / amax / 2 ** margin`, in place.

    Args:
        newest: (n,) largest magnitudes of the step; 0 leaves a slot as it was.
        history: (length, n); shifted by one row.
        scale: (n,) float32.
    """
    history[0] = newest
    amax = history.amax(0) if algorithm == "max" else newest
    history.copy_(torch.where(newest > 0, history.roll(-1, 0), history))
    history[0] = 0.0
    new = (E4M3_MAX / amax / 2.0**margin).clamp(max=_FLOAT32_MAX)
    scale.copy_(torch.where(newest > 0, new, scale))


def _update(
    newest: torch.Tensor,
    history: torch.Tensor,
    scale: torch.Tensor,
    algorithm: AmaxAlgorithm,
    margin: int,
) -> None:
    tex.fused_amax_and_scale_update_after_reduction(
        newest, [history], [scale], algorithm, tex.DType.kFloat8E4M3, margin
    )


def norm_backward(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of a norm's input, weight and (LayerNorm's) bias, by Transformer Engine on a GPU.

    Args:
        dy_TH: of the norm's output.
        mean, rstd: of each token, (T,) float32; no mean: RMSNorm.
    """
    dy_TH = dy_TH.contiguous()
    if mean is None:
        return tuple(tex.rmsnorm_bwd(dy_TH, x_TH, rstd, weight, 0, False))
    return tuple(tex.layernorm_bwd(dy_TH, x_TH, mean, rstd, weight, 0, False))
