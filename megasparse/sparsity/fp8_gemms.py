"""FP8 GEMMs: e4m3 operands with delayed scaling, 2:4 where the recipe is.

| GEMM        | 2:4 operand, packed                  | dense operand                            |
|-------------|--------------------------------------|------------------------------------------|
| output      | W~ e4m3                              | X e4m3                                   |
| grad_input  | W~^T e4m3 (transposable), else dense | dZ e4m3 (dense: e5m2 with "hybrid")      |
| grad_weight | MVUE(dZ^T) e4m3, along tokens        | X^T e4m3, kept from the forward pass     |

The sparse tensor cores multiply two operands of one format (e4m3 by e5m2 is refused by the
library), and a weight in e5m2 would have two bits of mantissa: so dZ is e4m3 where W~^T is packed.
Each tensor is read once: x gives its row-major and its transposed copy, the weight both packed
orientations, dZ the copy for grad_input and the packed draw for grad_weight. Results are bfloat16.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from megasparse.fp8 import Fp8Scales, Fp8Slot
from megasparse.kernels import (
    grad_pack24,
    matmul24,
    spmm24,
    swiglu_float8,
    swiglu_fused,
    swiglu_fused_backward,
    swiglu_grad_pack24,
    weight_pack24,
)
from megasparse.kernels.float8 import E5M2
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.sparsity.gemm_choice import GemmChooser, shared_chooser
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import Section

ALIGNMENT = 128  # rows and columns of a packed 8-bit operand, and tokens
# MVUE divides what it keeps by a probability: larger entries than dZ's are to be expected.
MVUE_HEADROOM = 4.0


class Fp8Slots(NamedTuple):
    """The scaling of one layer's operands."""

    x: Fp8Slot
    weight: Fp8Slot
    gradient: Fp8Slot
    draw: Fp8Slot

    @classmethod
    def of(cls, scales: Fp8Scales) -> Fp8Slots:
        """Four new ones."""
        return cls(*(scales.slot() for _ in range(4)))


class Fp8Gradient(NamedTuple):
    """dZ as both GEMMs of the backward pass read it.

    Attributes:
        row: (T', N) 8 bit, T' a multiple of 128.
        along_tokens: dZ^T (N, T'), packed or dense.
        tokens: T.
    """

    row: torch.Tensor
    along_tokens: Packed24 | torch.Tensor
    tokens: int


class DenseFp8Gemms:
    """All three GEMMs dense, in e4m3: layers of a dense phase.

    Args:
        w_NK: the weight.
        slots: of the layer.
    """

    halved: Set[str] = frozenset()

    def __init__(self, w_NK: torch.Tensor, slots: Fp8Slots) -> None:
        self._slots = slots
        slots.weight.begin(w_NK)
        w_NK = w_NK.detach()
        self._w_NK, self._w_KN = slots.weight.quantise(w_NK, columns=True)

    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self._output(x_TK, keep=False)[0]

    def output_keeping(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z_TN, kept = self._output(x_TK, keep=True)
        assert kept is not None
        return z_TN, kept

    def output_of(self, row: torch.Tensor, tokens: int) -> torch.Tensor:
        """`output` of an x (T', K) that is quantised with its slot's scale; T' in whole tiles."""
        return self._multiply_output(row, self._slots.x, self._slots.weight)[:tokens]

    def output_gated(
        self, fused_TF: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`output` (with `keep` `output_keeping`) of swiglu([gate | up]).

        Args:
            fused_TF: (T, 2 K), 16 bits.
        """
        x, weight = self._slots.x, self._slots.weight
        if not x.known:
            return self._output(swiglu_fused(fused_TF), keep)
        row, x_KT = swiglu_float8(
            fused_TF, scale=x.scale, transposed=keep, amax=x.amax if keep else None
        )
        return self._multiply_output(row, x, weight)[: fused_TF.shape[0]], x_KT

    def kept(self, x_TK: torch.Tensor) -> torch.Tensor:
        self._slots.x.begin(x_TK)
        _, x_KT = self._slots.x.quantise(_whole_tiles(x_TK), rows=False, columns=True)
        assert x_KT is not None
        return x_KT

    def _output(self, x_TK: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight = self._slots.x, self._slots.weight
        x.begin(x_TK)
        row, x_KT = x.quantise(_whole_tiles(x_TK), columns=keep, record=keep)
        assert row is not None
        return self._multiply_output(row, x, weight)[: x_TK.shape[0]], x_KT

    def _multiply_output(self, row: torch.Tensor, x: Fp8Slot, weight: Fp8Slot) -> torch.Tensor:
        assert self._w_NK is not None
        return scaled_mm(row, self._w_NK, x, weight)

    def gradient(self, dz_TN: torch.Tensor, seed: int) -> Fp8Gradient:
        slot = self._slots.gradient
        slot.begin(dz_TN)
        row, dz_NT = slot.quantise(_whole_tiles(dz_TN), columns=True)
        assert row is not None and dz_NT is not None
        return Fp8Gradient(row, dz_NT, dz_TN.shape[0])

    def gradient_gated(self, dy_TF: torch.Tensor, fused_TF: torch.Tensor, seed: int) -> Fp8Gradient:
        """`gradient` of that of [gate | up], this layer's output, from that of its swiglu."""
        return self.gradient(swiglu_fused_backward(dy_TF, fused_TF), seed)

    def grad_input(self, gradient: Fp8Gradient) -> torch.Tensor:
        assert self._w_KN is not None
        product = scaled_mm(gradient.row, self._w_KN, self._slots.gradient, self._slots.weight)
        return product[: gradient.tokens]

    def grad_weight(self, gradient: Fp8Gradient, kept: torch.Tensor) -> torch.Tensor:
        assert isinstance(gradient.along_tokens, torch.Tensor)
        return scaled_mm(gradient.along_tokens, kept, self._slots.gradient, self._slots.x)


class PackedFp8Gemms(DenseFp8Gemms):
    """The GEMMs of one step with W~ packed in e4m3.

    Args:
        w_NK: the master weight.
        mask: bool (N, K); None: the soft threshold times `threshold_scale`.
        threshold_scale: 0-d float32.
        recipe: transposable or not, and how dZ^T is pruned along tokens.
        channels: where the local output channels lie in the whole layer.
        slots: of the layer.
        hybrid: dZ in e5m2 where its GEMM is dense.
        error_flag, nan_flag: int32 (1,), raised on the device.
        probe: is told what is quantised.
        chooser: which of the library's algorithms computes a shape; default: the GPU's own.
    """

    def __init__(
        self,
        w_NK: torch.Tensor,
        mask: torch.Tensor | None,
        threshold_scale: torch.Tensor | None,
        recipe: SparsityRecipe,
        channels: tuple[Section, ...],
        slots: Fp8Slots,
        hybrid: bool = False,
        error_flag: torch.Tensor | None = None,
        nan_flag: torch.Tensor | None = None,
        probe: Probe | None = None,
        chooser: GemmChooser | None = None,
    ) -> None:
        self.halved = frozenset()
        self._unpacked: dict[str, torch.Tensor] = {}  # where a dense GEMM is faster
        self._slots, self._recipe, self._probe = slots, recipe, probe or Probe()
        self._channels = tuple((s.local_start, s.global_start, s.length) for s in channels)
        self._error_flag, self._chooser = error_flag, chooser
        self._row_dtype = E5M2 if hybrid and not recipe.transposable else E4M3
        if chooser is None and w_NK.is_cuda:
            self._chooser = shared_chooser(w_NK.device)
        slots.weight.begin(w_NK)
        self._packed, self._other = weight_pack24(
            w_NK,
            mask,
            threshold_scale=threshold_scale,
            dtype=E4M3,
            scale=slots.weight.scale,
            transposed="packed" if recipe.transposable else "dense",
            amax=slots.weight.amax,
            error_flag=error_flag,
            nan_flag=nan_flag,
        )
        if self._probe.asked:
            self._tell("weight", w_NK, self._packed.values, slots.weight)

    def _multiply_output(self, row: torch.Tensor, x: Fp8Slot, weight: Fp8Slot) -> torch.Tensor:
        return self._sparse("output", self._packed, row, x, weight)

    def gradient(self, dz_TN: torch.Tensor, seed: int) -> Fp8Gradient:
        slots, tokens = self._slots, dz_TN.shape[0]
        if self._recipe.mvue == "off":
            return super().gradient(dz_TN, seed)
        slots.gradient.begin(dz_TN)
        slots.draw.begin(dz_TN, MVUE_HEADROOM)
        with self._probe.timer.span("preparation"):
            row, packed = grad_pack24(_whole_tiles(dz_TN), seed=seed, **self._as_operands())
        assert row is not None
        if self._probe.asked:
            self._tell("grad_output", dz_TN, row, slots.gradient)
            self._probe.mvue(dz_TN, packed.values.float() * slots.draw.factor)
        return Fp8Gradient(row, packed, tokens)

    def gradient_gated(self, dy_TF: torch.Tensor, fused_TF: torch.Tensor, seed: int) -> Fp8Gradient:
        slots = self._slots
        at_once = self._recipe.mvue != "off" and slots.gradient.known and slots.draw.known
        if not at_once or self._probe.asked:
            return super().gradient_gated(dy_TF, fused_TF, seed)
        with self._probe.timer.span("preparation"):
            row, packed = swiglu_grad_pack24(dy_TF, fused_TF, seed=seed, **self._as_operands())
        assert row is not None
        return Fp8Gradient(row, packed, dy_TF.shape[0])

    def _as_operands(self) -> dict[str, Any]:
        """How dZ is quantised and drawn."""
        slots = self._slots
        return {
            "row_scale": slots.gradient.scale,
            "row_dtype": self._row_dtype,
            "packed_scale": slots.draw.scale,
            "channels": self._channels,
            "exact": self._recipe.mvue == "exact",
            "row_amax": slots.gradient.amax,
            "packed_amax": slots.draw.amax,
            "error_flag": self._error_flag,
        }

    def grad_input(self, gradient: Fp8Gradient) -> torch.Tensor:
        slots = self._slots
        if isinstance(self._other, Packed24):
            product = self._sparse(
                "grad_input", self._other, gradient.row, slots.gradient, slots.weight
            )
        else:
            assert self._other is not None
            product = scaled_mm(gradient.row, self._other, slots.gradient, slots.weight)
        return product[: gradient.tokens]

    def grad_weight(self, gradient: Fp8Gradient, kept: torch.Tensor) -> torch.Tensor:
        packed, slots = gradient.along_tokens, self._slots
        if not isinstance(packed, Packed24):
            return super().grad_weight(gradient, kept)
        factor = slots.draw.factor * slots.x.factor
        self.halved = self.halved | {"grad_weight"}
        (n, t), algorithm = packed.shape, 0
        if self._chooser is not None:
            # Dense or not, MVUE's draws are part of the result: only the algorithm is chosen.
            algorithm = self._chooser.choose(
                f"e4m3 grad_weight N {n}, K {kept.shape[0]}, T {t}",
                2 * n * t * kept.shape[0],
                lambda a: matmul24(packed, kept, transposed=True, algorithm=a, alpha=factor),
                lambda: scaled_mm(packed.stored(), kept, slots.draw, slots.x),
            ).algorithm
        return matmul24(packed, kept, transposed=True, algorithm=algorithm, alpha=factor)

    def _sparse(
        self, name: str, packed: Packed24, a: torch.Tensor, a_slot: Fp8Slot, w_slot: Fp8Slot
    ) -> torch.Tensor:
        """`a (T, K) @ W^T` of the packed W, bfloat16; by a dense GEMM where that is faster."""
        factor, (n, k) = a_slot.factor * w_slot.factor, packed.shape
        if self._chooser is None:
            self.halved = self.halved | {name}
            return spmm24(packed, a, alpha=factor)
        choice = self._chooser.choose(
            f"e4m3 T {a.shape[0]}, N {n}, K {k}",
            2 * n * k * a.shape[0],
            lambda algorithm: spmm24(packed, a, algorithm=algorithm, alpha=factor),
            lambda: scaled_mm(a, self._dense(name, packed), a_slot, w_slot),
        )
        if choice.dense_wins:
            return scaled_mm(a, self._dense(name, packed), a_slot, w_slot)
        self._unpacked.pop(name, None)
        self.halved = self.halved | {name}
        return spmm24(packed, a, algorithm=choice.algorithm, alpha=factor)

    def _dense(self, name: str, packed: Packed24) -> torch.Tensor:
        if name not in self._unpacked:
            self._unpacked[name] = packed.stored()
        return self._unpacked[name]

    def _tell(
        self, operand: str, values: torch.Tensor, stored: torch.Tensor, slot: Fp8Slot
    ) -> None:
        self._probe.fp8(operand, values, stored.float(), slot.scale, stored.dtype)


def scaled_mm(
    a_TK: torch.Tensor, b_NK: torch.Tensor, a_slot: Fp8Slot, b_slot: Fp8Slot
) -> torch.Tensor:
    """`a b^T` (T, N) bfloat16 of two 8-bit matrices with their scaling undone: a dense GEMM."""
    if not a_TK.is_cuda:
        factor = a_slot.factor * b_slot.factor
        return (a_TK.float() @ b_NK.float().t() * factor).to(torch.bfloat16)
    return torch._scaled_mm(
        a_TK, b_NK.t(), a_slot.inverse, b_slot.inverse,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def _whole_tiles(x_TK: torch.Tensor) -> torch.Tensor:
    """Tokens of zeros up to a multiple of 128: they add nothing."""
    missing = -x_TK.shape[0] % ALIGNMENT
    return pad(x_TK, (0, 0, 0, missing)) if missing else x_TK
