"""BF16 GEMMs with 2:4 operands that cuSPARSELt packs itself: GPUs with another layout than ours.

Pruned matrices are made dense first, by the definition's kernels, and compressed by the library.
So a step has more passes over weights and output gradients than `packed.py` needs. A GEMM is sparse
where that was measured to be faster than the dense one on the GPU at hand; of `grad_weight` the
transposition and the compression of the draw, which every micro-batch needs, are measured too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megasparse.errors import KernelError
from megasparse.kernels import matmul24, spmm24
from megasparse.kernels.spmm24.cusparselt_packing import LibraryPacked24, pack24_by_library
from megasparse.sparsity.gemms.choice import Choice, GemmChooser, shared_chooser
from megasparse.sparsity.gemms.dense import ReferenceSparseGemms
from megasparse.sparsity.gemms.packed import ALIGNMENT
from megasparse.sparsity.gemms.protocol import Deferred, GradOutput, SavedInput, with_bias
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ALL_TOKENS, ShardSlice, TokenShare


class LibrarySparseGemms(ReferenceSparseGemms):
    """The GEMMs of a sparse phase with operands that the library packs.

    Args:
        recipe: transposable or not, and how dZ^T is pruned along tokens.
        channels: where the local output channels lie in the whole layer.
        probe: is told what MVUE draws.
        chooser: which GEMM computes which shape; default: the GPU's own, kept on disk.
        tokens: which tokens of a micro-batch are here; all by default.
    """

    _packed: LibraryPacked24 | None = None
    _packed_t: LibraryPacked24 | None = None
    _w_KN: torch.Tensor | None = None

    def __init__(
        self,
        recipe: SparsityRecipe,
        channels: tuple[ShardSlice, ...],
        probe: Probe | None = None,
        chooser: GemmChooser | None = None,
        tokens: TokenShare = ALL_TOKENS,
    ) -> None:
        super().__init__(recipe, channels, probe, tokens)
        self._packs_transpose = recipe.packed_transpose is not None
        # The library packs groups of neighbours.
        self._packs_draws = recipe.mvue != "off" and not recipe.strided_groups
        self._chooser = chooser
        self._choices: dict[tuple[str, int], Choice] = {}

    @staticmethod
    def refusal(weight: torch.Tensor) -> str | None:
        """Why the library does not pack a matrix of this dtype here, or None."""
        try:
            pack24_by_library(torch.zeros_like(weight[:ALIGNMENT, :ALIGNMENT]).contiguous())
        except KernelError as error:
            return str(error)
        return None

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        super().refill(w_NK, projected)
        self._packed = pack24_by_library(self._w_NK, self._packed)
        if self._packs_transpose:
            w_KN = self._of_grad_input.t()
            if self._w_KN is None:
                self._w_KN = torch.empty_like(w_KN, memory_format=torch.contiguous_format)
            self._w_KN.copy_(w_KN)
            self._packed_t = pack24_by_library(self._w_KN, self._packed_t)

    def output(self, x_TK: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert self._packed is not None
        return self._multiply("output", self._packed, x_TK, bias)

    def grad_input(self, operands: GradOutput, deferred: Deferred | None = None) -> torch.Tensor:
        if self._packed_t is None:
            return super().grad_input(operands)
        return self._multiply("grad_input", self._packed_t, operands.dz_TN)

    def grad_weight(self, operands: GradOutput, saved: SavedInput) -> torch.Tensor:
        (x_TK,) = saved
        tokens, (n, k) = x_TK.shape[0], self._w_NK.shape
        if not self._packs_draws or tokens % ALIGNMENT:
            return super().grad_weight(operands, saved)
        drawn_NT = self._drawn(operands).t()

        def sparse(algorithm: int) -> torch.Tensor:
            # Rows of the draw have to lie in memory one after the other: its transposition counts.
            return matmul24(pack24_by_library(drawn_NT.contiguous()), x_TK, algorithm=algorithm)

        choice = self._choice(
            "grad_weight",
            tokens,
            f"drawn, packed by the library, grad_weight N {n}, K {k}, T {tokens}, {x_TK.dtype}",
            sparse,
            lambda: drawn_NT @ x_TK,
        )
        if choice.dense_wins:
            return drawn_NT @ x_TK
        self.ran_sparse.add("grad_weight")
        return sparse(choice.algorithm)

    def _multiply(
        self,
        name: str,
        packed: LibraryPacked24,
        a_TK: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`a W^T + bias` of the packed W (N, K), or by the dense GEMM where that is faster."""
        tokens, (n, k) = a_TK.shape[0], packed.shape
        choice = self._choice(
            name,
            tokens,
            f"packed by the library, T {tokens}, N {n}, K {k}, {a_TK.dtype}",
            lambda algorithm: spmm24(packed, a_TK, algorithm=algorithm, bias=bias),
            lambda: with_bias(a_TK @ packed.dense().t(), bias),
        )
        if choice.dense_wins:
            return with_bias(a_TK @ packed.dense().t(), bias)
        self.ran_sparse.add(name)
        return spmm24(packed, a_TK, algorithm=choice.algorithm, bias=bias)

    def _choice(
        self,
        name: str,
        tokens: int,
        key: str,
        sparse: Callable[[int], torch.Tensor],
        dense: Callable[[], torch.Tensor],
    ) -> Choice:
        known = self._choices.get((name, tokens))
        if known is None:
            known = Choice.untuned()
            if self._chooser is not None or self._w_NK.is_cuda:
                chooser: Any = self._chooser or shared_chooser(self._w_NK.device)
                known = chooser.choose(key, 2 * tokens * self._w_NK.numel(), sparse, dense)
            self._choices[name, tokens] = known
        return known
