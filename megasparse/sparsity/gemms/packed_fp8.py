"""FP8 GEMMs: e4m3 operands with delayed or current scaling, 2:4 where the recipe is.

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
from typing import Any, NamedTuple, cast

import torch
from torch.nn.functional import pad

from megasparse.fp8.current import CurrentSlot, Scales, Scaling, Slot
from megasparse.fp8.delayed import Fp8Slot
from megasparse.kernels import (
    effective_weight,
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
from megasparse.sparsity.gemms.choice import GemmChooser, shared_chooser
from megasparse.sparsity.gemms.fp8_products import alpha_of, key_suffix, scaled_mm, undone
from megasparse.sparsity.gemms.protocol import Kept
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import Section

ALIGNMENT = 128  # rows and columns of a packed 8-bit operand, and tokens
# MVUE divides what it keeps by a probability: larger entries than dZ's are to be expected.
MVUE_HEADROOM = 4.0


class Fp8Slots(NamedTuple):
    """The scaling of one layer's operands."""

    x: Slot
    weight: Slot
    gradient: Slot
    draw: Slot

    @classmethod
    def of(cls, scales: Scales, split: int | None = None) -> Fp8Slots:
        """Four new ones.

        Args:
            split: the dimension of the weight (N, K) that tensor parallelism splits: 0 splits dZ
                too, 1 splits x.
        """
        sharded = (split == 1, split is not None, split == 0, split == 0)
        return cls(*(scales.slot(part) for part in sharded))

    def export_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: of current scaling nothing."""
        if isinstance(self.x, CurrentSlot):
            return {}
        return self.x.scales.export_state(cast(tuple[Fp8Slot, ...], self))

    def import_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `export_state` gave; current scaling takes nothing of another recipe."""
        if not isinstance(self.x, CurrentSlot):
            self.x.scales.import_state(cast(tuple[Fp8Slot, ...], self), state)


class Fp8Gradient(NamedTuple):
    """dZ as both GEMMs of the backward pass read it.

    Attributes:
        row: (T', N) 8 bit, T' a multiple of 128.
        along_tokens: dZ^T (N, T'), packed or dense.
        tokens: T.
        row_scaling, along_scaling: of the two.
    """

    row: torch.Tensor
    along_tokens: Packed24 | torch.Tensor
    tokens: int
    row_scaling: Scaling
    along_scaling: Scaling


class DenseFp8Gemms:
    """All three GEMMs dense, in e4m3: layers of a dense phase.

    Args:
        w_NK: the weight.
        slots: of the layer.
    """

    halved: Set[str] = frozenset()

    def __init__(self, w_NK: torch.Tensor, slots: Fp8Slots) -> None:
        self._slots = slots
        row, column, scaling = slots.weight.quantised(w_NK.detach(), columns=True)
        self._w_NK, self._w_KN = row, column
        self._weight: Scaling = scaling

    def output(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self._output(x_TK, keep=False)[0]

    def output_keeping(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        return self._output(x_TK, keep=True)

    def output_of(
        self, row: torch.Tensor, x_KT: torch.Tensor | None, tokens: int
    ) -> tuple[torch.Tensor, Kept]:
        """`output` (with `x_KT` `output_keeping`) of an x in whole tiles of e4m3."""
        x = self._slots.x
        assert isinstance(x, Fp8Slot)
        return self._multiply_output(row, x)[:tokens], _keep(x_KT, x)

    def output_gated(self, fused_TF: torch.Tensor, keep: bool) -> tuple[torch.Tensor, Kept]:
        """`output` (with `keep` `output_keeping`) of swiglu([gate | up]).

        A scale of the moment follows from the whole activation, which is computed in 16 bits then.

        Args:
            fused_TF: (T, 2 K), 16 bits.
        """
        x = self._slots.x
        if isinstance(x, CurrentSlot) or not x.known:
            return self._output(swiglu_fused(fused_TF), keep)
        row, x_KT = swiglu_float8(
            fused_TF, scale=x.scale, transposed=keep, amax=x.amax if keep else None
        )
        return self.output_of(row, x_KT, fused_TF.shape[0])

    def kept(self, x_TK: torch.Tensor) -> Kept:
        _, x_KT, x = self._slots.x.quantised(_whole_tiles(x_TK), rows=False, columns=True)
        return _keep(x_KT, x)

    def _output(self, x_TK: torch.Tensor, keep: bool) -> tuple[torch.Tensor, Kept]:
        tiles_TK = _whole_tiles(x_TK)
        row, x_KT, x = self._slots.x.quantised(tiles_TK, columns=keep, record=keep)
        assert row is not None
        return self._multiply_output(row, x)[: x_TK.shape[0]], _keep(x_KT, x)

    def _multiply_output(self, row: torch.Tensor, x: Scaling) -> torch.Tensor:
        assert self._w_NK is not None
        return scaled_mm(row, self._w_NK, x, self._weight)

    def gradient(self, dz_TN: torch.Tensor, seed: int) -> Fp8Gradient:
        row, dz_NT, dz = self._slots.gradient.quantised(_whole_tiles(dz_TN), columns=True)
        assert row is not None and dz_NT is not None
        return Fp8Gradient(row, dz_NT, dz_TN.shape[0], dz, dz)

    def gradient_gated(self, dy_TF: torch.Tensor, fused_TF: torch.Tensor, seed: int) -> Fp8Gradient:
        """`gradient` of that of [gate | up], this layer's output, from that of its swiglu."""
        return self.gradient(swiglu_fused_backward(dy_TF, fused_TF), seed)

    def grad_input(self, gradient: Fp8Gradient) -> torch.Tensor:
        assert self._w_KN is not None
        product = scaled_mm(gradient.row, self._w_KN, gradient.row_scaling, self._weight)
        return product[: gradient.tokens]

    def grad_weight(self, gradient: Fp8Gradient, kept: Kept) -> torch.Tensor:
        assert isinstance(gradient.along_tokens, torch.Tensor)
        x = self._slots.x.of_kept(kept[1:])
        return scaled_mm(gradient.along_tokens, kept[0], gradient.along_scaling, x)


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
        # Of all entries, kept or not: a bound, and nearly always the largest is kept.
        headroom = 1.0 if threshold_scale is None else threshold_scale
        self._weight = slots.weight.begin(w_NK, headroom)
        self._packed, self._other = weight_pack24(
            w_NK,
            mask,
            threshold_scale=threshold_scale,
            dtype=E4M3,
            scale=self._weight.scale,
            transposed="packed" if recipe.transposable else "dense",
            amax=self._weight.amax,
            error_flag=error_flag,
            nan_flag=nan_flag,
        )
        if self._probe.asked:
            self._tell("weight", effective_weight(w_NK, mask, threshold_scale), self._packed.values)

    def _multiply_output(self, row: torch.Tensor, x: Scaling) -> torch.Tensor:
        return self._sparse("output", self._packed, row, x)

    def gradient(self, dz_TN: torch.Tensor, seed: int) -> Fp8Gradient:
        slots, tokens = self._slots, dz_TN.shape[0]
        if self._recipe.mvue == "off":
            return super().gradient(dz_TN, seed)
        with self._probe.timer.span("preparation"):
            dz = slots.gradient.begin(dz_TN, dtype=self._row_dtype)
            draw = slots.draw.begin_draws(dz_TN, MVUE_HEADROOM, dz)
            row, packed = grad_pack24(_whole_tiles(dz_TN), seed=seed, **self._as_operands(dz, draw))
        assert row is not None
        if self._probe.asked:
            self._tell("grad_output", dz_TN, row)
            self._probe.mvue(dz_TN, packed.values.float() * draw.inverse)
        return Fp8Gradient(row, packed, tokens, dz, draw)

    def gradient_gated(self, dy_TF: torch.Tensor, fused_TF: torch.Tensor, seed: int) -> Fp8Gradient:
        dz, draw = self._slots.gradient, self._slots.draw
        if (
            isinstance(dz, CurrentSlot)
            or isinstance(draw, CurrentSlot)
            or not (self._recipe.mvue != "off" and dz.known and draw.known)
            or self._probe.asked
        ):
            return super().gradient_gated(dy_TF, fused_TF, seed)
        with self._probe.timer.span("preparation"):
            how = self._as_operands(dz, draw)
            row, packed = swiglu_grad_pack24(dy_TF, fused_TF, seed=seed, **how)
        assert row is not None
        return Fp8Gradient(row, packed, dy_TF.shape[0], dz, draw)

    def _as_operands(self, dz: Scaling, draw: Scaling) -> dict[str, Any]:
        """How dZ is quantised and drawn."""
        return {
            "row_scale": dz.scale,
            "row_dtype": self._row_dtype,
            "packed_scale": draw.scale,
            "channels": self._channels,
            "exact": self._recipe.mvue == "exact",
            "row_amax": dz.amax,
            "packed_amax": draw.amax,
            "error_flag": self._error_flag,
        }

    def grad_input(self, gradient: Fp8Gradient) -> torch.Tensor:
        dz = gradient.row_scaling
        if isinstance(self._other, Packed24):
            product = self._sparse("grad_input", self._other, gradient.row, dz)
        else:
            assert self._other is not None
            product = scaled_mm(gradient.row, self._other, dz, self._weight)
        return product[: gradient.tokens]

    def grad_weight(self, gradient: Fp8Gradient, kept: Kept) -> torch.Tensor:
        packed, x_KT = gradient.along_tokens, kept[0]
        if not isinstance(packed, Packed24):
            return super().grad_weight(gradient, kept)
        draw, x = gradient.along_scaling, self._slots.x.of_kept(kept[1:])

        def product(algorithm: int) -> torch.Tensor:
            how: dict[str, Any] = {"algorithm": algorithm, "alpha": alpha_of(draw, x)}
            return undone(matmul24(packed, x_KT, transposed=True, **how), draw, x)

        self.halved = self.halved | {"grad_weight"}
        (n, t), algorithm = packed.shape, 0
        if self._chooser is not None:
            # Dense or not, MVUE's draws are part of the result: only the algorithm is chosen.
            algorithm = self._chooser.choose(
                f"e4m3 grad_weight N {n}, K {x_KT.shape[0]}, T {t}{key_suffix(x)}",
                2 * n * t * x_KT.shape[0],
                product,
                lambda: scaled_mm(packed.stored(), x_KT, draw, x),
            ).algorithm
        return product(algorithm)

    def _sparse(
        self, name: str, packed: Packed24, a: torch.Tensor, scaling: Scaling
    ) -> torch.Tensor:
        """`a (T, K) @ W^T` of the packed W, bfloat16; by a dense GEMM where that is faster."""
        (n, k), weight = packed.shape, self._weight

        def product(algorithm: int) -> torch.Tensor:
            alpha = alpha_of(scaling, weight)
            return undone(spmm24(packed, a, algorithm=algorithm, alpha=alpha), scaling, weight)

        if self._chooser is None:
            self.halved = self.halved | {name}
            return product(0)
        choice = self._chooser.choose(
            f"e4m3 T {a.shape[0]}, N {n}, K {k}{key_suffix(scaling)}",
            2 * n * k * a.shape[0],
            product,
            lambda: scaled_mm(a, self._dense(name, packed), scaling, weight),
        )
        if choice.dense_wins:
            return scaled_mm(a, self._dense(name, packed), scaling, weight)
        self._unpacked.pop(name, None)
        self.halved = self.halved | {name}
        return product(choice.algorithm)

    def _dense(self, name: str, packed: Packed24) -> torch.Tensor:
        if name not in self._unpacked:
            self._unpacked[name] = packed.stored()
        return self._unpacked[name]

    def _tell(self, operand: str, values: torch.Tensor, stored: torch.Tensor) -> None:
        self._probe.fp8(operand, values, stored.float(), stored.dtype)


def _keep(x_KT: torch.Tensor | None, x: Scaling) -> Kept:
    return () if x_KT is None else (x_KT, *x.kept_with())


def _whole_tiles(x_TK: torch.Tensor) -> torch.Tensor:
    """Tokens of zeros up to a multiple of 128: they add nothing."""
    missing = -x_TK.shape[0] % ALIGNMENT
    return pad(x_TK, (0, 0, 0, missing)) if missing else x_TK
