"""FP8 GEMMs with 2:4 operands: e4m3 with delayed or current scaling.

| GEMM        | 2:4 operand, packed                  | dense operand                            |
|-------------|--------------------------------------|------------------------------------------|
| output      | W~ e4m3                              | X e4m3                                   |
| grad_input  | W~^T e4m3 (transposable) or W~_d^T   | dZ e4m3 (dense: e5m2 with "hybrid")      |
|             | (double-pruned), else dense          |                                          |
| grad_weight | MVUE(dZ^T) e4m3, along tokens        | X^T e4m3, saved by the forward pass      |

The sparse tensor cores multiply two operands of one format (e4m3 by e5m2 is refused by the
library), and a weight in e5m2 would have two bits of mantissa: so dZ is e4m3 where W~^T is packed.
Each tensor is read once: x gives its row-major and its transposed copy, the weight both packed
orientations, dZ the copy for grad_input and the packed draw for grad_weight. Results are bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megasparse.fp8.current import amax_of
from megasparse.fp8.scale import Scale
from megasparse.kernels import (
    Activation,
    activation_grad_amax,
    activation_grad_pack24,
    effective_weight,
    grad_pack24,
    matmul24,
    spmm24,
    weight_pack24,
)
from megasparse.kernels.factors import Factors
from megasparse.kernels.packed24 import E4M3, Packed24
from megasparse.kernels.random import SeedLike
from megasparse.sparsity.gemms.choice import Choice, GemmChooser, shared_chooser
from megasparse.sparsity.gemms.dense_fp8 import (
    DenseFp8Gemms,
    Fp8GradOutput,
    OperandQuantizers,
    whole_tiles,
)
from megasparse.sparsity.gemms.fp8_products import scaled_mm, undone, with_factors
from megasparse.sparsity.gemms.protocol import Deferred, SavedInput
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ALL_TOKENS, ShardSlice, TokenShare

# MVUE divides what it keeps by a probability: larger entries than dZ's are to be expected.
MVUE_HEADROOM = 4.0


class PackedFp8Gemms(DenseFp8Gemms):
    """The GEMMs of a sparse phase with W~ packed in e4m3.

    Args:
        recipe: what of W~^T is 2:4, and how dZ^T is pruned along tokens.
        channels: where the local output channels lie in the whole layer.
        quantizers: of the layer.
        hybrid: dZ in e5m2 where its GEMM is dense.
        probe: is told what is quantized.
        chooser: which of the library's algorithms computes a shape; default: the GPU's own.
        tokens: which tokens of a micro-batch are here; all by default.
    """

    _packed: Packed24
    _other: Packed24 | torch.Tensor

    def __init__(
        self,
        recipe: SparsityRecipe,
        channels: tuple[ShardSlice, ...],
        quantizers: OperandQuantizers,
        hybrid: bool = False,
        probe: Probe | None = None,
        chooser: GemmChooser | None = None,
        tokens: TokenShare = ALL_TOKENS,
    ) -> None:
        self._tokens = tokens
        super().__init__(quantizers, hybrid and recipe.packed_transpose is None, probe)
        self._recipe = recipe
        self.strided = recipe.strided_groups
        self._channels = tuple((s.local_start, s.global_start, s.length) for s in channels)
        self._chooser = chooser
        self._choices: dict[tuple[str, int], Choice] = {}
        self._unpacked: dict[str, torch.Tensor] = {}  # where a dense GEMM is faster
        self._error_flag: torch.Tensor | None = None
        self._operands: tuple[Packed24, Packed24 | torch.Tensor] | None = None

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        assert projected is not None
        if self._chooser is None and w_NK.is_cuda:
            self._chooser = shared_chooser(w_NK.device)
        self._error_flag = projected.error_flag
        # Of all entries, kept or not: a bound, and nearly always the largest is kept.
        headroom = 1.0 if projected.beta is None else projected.beta
        scale = self._quantizers.weight.scale_for(w_NK, headroom)
        self._weight = self._scale_in_place(scale)
        packed, other = weight_pack24(
            w_NK,
            projected.mask,
            threshold_scale=projected.beta,
            dtype=E4M3,
            scale=self._weight.scale,
            transposed=self._recipe.packed_transpose or "dense",
            amax=self._weight.amax,
            error_flag=projected.error_flag,
            nan_flag=projected.nan_flag,
            out=self._operands,
        )
        assert other is not None
        self._packed, self._other = self._operands = packed, other
        for name, dense in self._unpacked.items():
            dense.copy_(self._packed_of(name).stored())
        if self._probe.asked:
            pruned = effective_weight(w_NK, projected.mask, projected.beta)
            self._probe.fp8("weight", pruned, packed.values)

    def _multiply_output(
        self,
        row: torch.Tensor,
        x: Scale,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
        deferred: Deferred | None = None,
    ) -> torch.Tensor:
        return self._sparse("output", row, x, bias, out, deferred)

    def prepare_grad_output(
        self, dz_TN: torch.Tensor, seed: SeedLike, sums: torch.Tensor | None = None
    ) -> Fp8GradOutput:
        quantizers, tokens = self._quantizers, dz_TN.shape[0]
        if self._recipe.mvue == "off":
            return super().prepare_grad_output(dz_TN, seed, sums)
        with self._probe.timer.span("preparation"):
            dz = quantizers.gradient.scale_for(dz_TN, dtype=self._row_dtype)
            draw = quantizers.draw.scale_for_draws(lambda: amax_of(dz_TN), MVUE_HEADROOM, dz)
            how = self._as_operands(dz, draw, tokens)
            tiles_TN = whole_tiles(dz_TN)
            row, packed = grad_pack24(tiles_TN, seed=seed, sums=sums, **how)
        assert row is not None
        if self._probe.asked:
            self._probe.fp8("grad_output", dz_TN, row)
            self._probe.mvue(tiles_TN, packed.values, self._recipe, draw.scale_inv)
        return Fp8GradOutput(row, packed, tokens, dz, draw)

    def prepare_activated_grad_output(
        self,
        dy_TF: torch.Tensor,
        projected_TF: torch.Tensor,
        activation: Activation,
        seed: SeedLike,
        sums: torch.Tensor | None = None,
        factors: tuple[Factors | None, Factors | None] = (None, None),
    ) -> Fp8GradOutput:
        if self._recipe.mvue == "off" or self._probe.asked:
            return super().prepare_activated_grad_output(
                dy_TF, projected_TF, activation, seed, sums, factors
            )
        lacks: dict[str, Any] = dict(zip(("dy_factors", "factors"), factors, strict=True))

        def largest() -> torch.Tensor:
            return activation_grad_amax(dy_TF, projected_TF, activation, **lacks)

        with self._probe.timer.span("preparation"):
            dz = self._quantizers.gradient.scale_by(largest, dtype=self._row_dtype)
            draw = self._quantizers.draw.scale_for_draws(largest, MVUE_HEADROOM, dz)
            how = self._as_operands(dz, draw, dy_TF.shape[0])
            row, packed = activation_grad_pack24(
                dy_TF, projected_TF, activation=activation, seed=seed, sums=sums, **lacks, **how
            )
        assert row is not None
        return Fp8GradOutput(row, packed, dy_TF.shape[0], dz, draw)

    def _as_operands(self, dz: Scale, draw: Scale, tokens: int) -> dict[str, Any]:
        """How dZ of so many tokens is quantized and drawn."""
        return {
            "row_scale": dz.scale,
            "row_dtype": self._row_dtype,
            "packed_scale": draw.scale,
            "channels": self._channels,
            "tokens": self._tokens.places(tokens),
            "exact": self._recipe.mvue == "exact",
            "strided": self.strided,
            "row_amax": dz.amax,
            "packed_amax": draw.amax,
            "error_flag": self._error_flag,
        }

    def grad_input(self, operands: Fp8GradOutput, deferred: Deferred | None = None) -> torch.Tensor:
        dz = operands.row_scale
        if isinstance(self._other, Packed24):
            product = self._sparse("grad_input", operands.row, dz, deferred=deferred)
        else:
            product = scaled_mm(operands.row, self._other, dz, self._weight_now())
        return product[: operands.tokens]

    def grad_weight(self, operands: Fp8GradOutput, saved: SavedInput) -> torch.Tensor:
        if not isinstance(operands.along_tokens, Packed24):
            return super().grad_weight(operands, saved)
        product, draw, x, choice = self._along_tokens(operands.along_tokens, operands, saved)
        return undone(lambda alpha: product(choice.algorithm, alpha), draw, x)

    def grad_weight_to_scale(
        self, operands: Fp8GradOutput, saved: SavedInput
    ) -> tuple[torch.Tensor, Factors | None]:
        if not isinstance(operands.along_tokens, Packed24):
            return super().grad_weight_to_scale(operands, saved)
        product, draw, x, choice = self._along_tokens(operands.along_tokens, operands, saved)
        return with_factors(lambda alpha: product(choice.algorithm, alpha), draw, x)

    def _along_tokens(
        self, packed: Packed24, operands: Fp8GradOutput, saved: SavedInput
    ) -> tuple[Callable[[int, float], torch.Tensor], Scale, Scale, Choice]:
        """The product of grad_weight by an algorithm and a factor, the scales of its operands, and
        the algorithm that was chosen."""
        x_KT, draw = saved[0], operands.along_scale
        x = self._quantizers.x.scale_of_saved(saved[1:])

        def product(algorithm: int, alpha: float) -> torch.Tensor:
            return matmul24(packed, x_KT, transposed=True, algorithm=algorithm, alpha=alpha)

        # Dense or not, MVUE's draws are part of the result: only the algorithm is chosen.
        (n, t), k = packed.shape, x_KT.shape[0]
        choice = self._choice(
            "grad_weight",
            t,
            lambda: f"e4m3 grad_weight N {n}, K {k}, T {t}",
            2 * n * t * k,
            lambda algorithm: undone(lambda alpha: product(algorithm, alpha), draw, x),
            lambda: scaled_mm(packed.stored(), x_KT, draw, x),
        )
        self.ran_sparse.add("grad_weight")
        return product, draw, x, choice

    def _sparse(
        self,
        name: str,
        a: torch.Tensor,
        scale: Scale,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        deferred: Deferred | None = None,
    ) -> torch.Tensor:
        """`a (T, K) @ W^T + bias` of a packed W, bfloat16; by a dense GEMM where that is faster."""
        packed, weight, tokens = self._packed_of(name), self._weight_now(), a.shape[0]
        (n, k) = packed.shape

        def product(algorithm: int, deferred: Deferred | None = None) -> torch.Tensor:
            return undone(
                lambda alpha, **added: spmm24(
                    packed, a, algorithm=algorithm, alpha=alpha, out=out, **added
                ),
                scale,
                weight,
                bias,
                deferred,
            )

        unpacked = functools.cache(packed.stored)  # once for all that is timed
        choice = self._choice(
            name,
            tokens,
            lambda: f"e4m3 T {tokens}, N {n}, K {k}",
            2 * n * k * tokens,
            product,
            lambda: scaled_mm(a, unpacked(), scale, weight, bias),
        )
        if choice.dense_wins:
            if name not in self._unpacked:
                self._unpacked[name] = packed.stored()
            return scaled_mm(a, self._unpacked[name], scale, weight, bias, out)
        self.ran_sparse.add(name)
        return product(choice.algorithm, deferred)

    def _choice(self, name: str, tokens: int, key: Any, flops: int, *products: Any) -> Choice:
        """Kept here too, as making the chooser's key takes the host's time."""
        known = self._choices.get((name, tokens))
        if known is None:
            known = Choice.untuned()
            if self._chooser is not None:
                known = self._chooser.choose(key(), flops, *products)
            self._choices[name, tokens] = known
        return known

    def _packed_of(self, name: str) -> Packed24:
        packed = self._packed if name == "output" else self._other
        assert isinstance(packed, Packed24)
        return packed
