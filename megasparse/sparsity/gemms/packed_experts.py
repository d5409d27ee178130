"""2:4 GEMMs of experts on sparse tensor cores: 16-bit, by cuSPARSELt, one product an expert.

The stacked weight is projected and packed in one pass, and the parts of each expert are put side by
side as the library reads them (`by_expert`): the number of launches does not depend on the number
of experts. Output and grad_input of all experts are computed sparse, or by one grouped dense GEMM
on the same pruned weights where that is faster; the two are measured against each other for all
experts together, once for a range of tokens. The weight gradient stays with MVUE, whose draws are
part of the result.

An expert's tokens are of any number. Products of 64 rows more or less are one plan of the library:
a product runs over the rows of the next expert, which that writes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad

from megasparse.kernels import matmul24, pack24, spmm24, unpack24, weight_pack24
from megasparse.kernels.packed24 import Packed24
from megasparse.kernels.random import SeedLike
from megasparse.sparsity.gemms.choice import Choice, GemmChooser, shared_chooser
from megasparse.sparsity.gemms.experts import Arrivals, ReferenceExpertGemms, rows_at
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected, effective
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ShardSlice

TILE = 64  # rows and columns of a packed 16-bit operand


class PackedExpertGemms(ReferenceExpertGemms):
    """The GEMMs of a sparse phase with the experts' W~ packed.

    Args:
        experts: E of this rank.
        recipe: what grad_input multiplies, and how dZ^T is pruned along tokens.
        channels: where an expert's local outputs lie among its own.
        probe: is told what MVUE draws.
        chooser: which GEMMs compute which shape; default: the GPU's own, kept on disk.
    """

    def __init__(
        self,
        experts: int,
        recipe: SparsityRecipe,
        channels: tuple[ShardSlice, ...],
        probe: Probe | None = None,
        chooser: GemmChooser | None = None,
    ) -> None:
        super().__init__(experts, recipe, channels, probe, grouped=True)
        self._chooser = chooser
        self._choices: dict[tuple[str, int], Choice] = {}
        self._operands: tuple[Packed24, Packed24 | torch.Tensor | None] | None = None
        self._packed: list[Packed24] = []
        self._packed_t: list[Packed24] = []
        self._is_dense = False  # whether W~ is there as a dense matrix too

    def refill(self, w_NK: torch.Tensor, projected: Projected | None) -> None:
        assert projected is not None
        self._master, self._projected, self._is_dense = w_NK.detach(), projected, False
        self._operands = weight_pack24(
            self._master,
            projected.mask,
            threshold_scale=projected.beta,
            transposed=self._recipe.packed_transpose,
            error_flag=projected.error_flag,
            nan_flag=projected.nan_flag,
            out=self._operands,
        )
        packed, packed_t = self._operands
        self._packed = by_expert(packed, self._experts, 0, self._packed)
        if isinstance(packed_t, Packed24):
            self._packed_t = by_expert(packed_t, self._experts, 1, self._packed_t)

    def output(self, x_TK: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        return self._multiply("output", self._packed, x_TK, arrivals, super().output)

    def grad_input(self, dz_TN: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        if not self._packed_t:
            return super().grad_input(dz_TN, arrivals)
        return self._multiply("grad_input", self._packed_t, dz_TN, arrivals, super().grad_input)

    def grad_weight(
        self, dz_TN: torch.Tensor, x_TK: torch.Tensor, arrivals: Arrivals, seed: SeedLike
    ) -> torch.Tensor:
        if self._recipe.mvue == "off":
            return self._weight_gradients(dz_TN, x_TK, arrivals.counts)
        draws = arrivals.draws(TILE)
        dz_NT = self._drawn(dz_TN, draws, seed).t().contiguous()
        x_TK, flag = rows_at(x_TK, draws.source), self._projected.error_flag
        dw = x_TK.new_zeros(self._experts, dz_NT.shape[0], x_TK.shape[1])

        def products(algorithm: int) -> torch.Tensor:
            parts = dz_NT.split(draws.counts, 1), x_TK.split(draws.counts)
            for block, dz, x in zip(dw, *parts, strict=True):
                if len(x):
                    packed = pack24(dz, error_flag=flag)
                    block.copy_(matmul24(packed, x, algorithm=algorithm))
            return dw

        choice = self._choice(
            "grad_weight",
            dz_NT.shape[0] * x_TK.shape[1],
            len(x_TK),
            products,
            lambda: self._weight_gradients(dz_NT.t(), x_TK, draws.counts).view_as(dw),
        )
        if choice.dense_wins:
            return self._weight_gradients(dz_NT.t(), x_TK, draws.counts)
        self.ran_sparse.add("grad_weight")
        return products(choice.algorithm).flatten(0, 1)

    def _multiply(
        self,
        name: str,
        packed: Sequence[Packed24],
        a: torch.Tensor,
        arrivals: Arrivals,
        dense: Callable[[torch.Tensor, Arrivals], torch.Tensor],
    ) -> torch.Tensor:
        """`a_e @ W_e^T` of the packed W of every expert, or dense where that is faster."""
        rows, columns = packed[0].shape

        def products(algorithm: int) -> torch.Tensor:
            return each_product(packed, a, arrivals.counts, algorithm)

        choice = self._choice(
            name, rows * columns, a.shape[0], products, lambda: dense(a, arrivals)
        )
        if choice.dense_wins:
            return dense(a, arrivals)
        self.ran_sparse.add(name)
        return products(choice.algorithm)

    def _choice(
        self,
        name: str,
        size: int,
        tokens: int,
        sparse: Callable[[int], torch.Tensor],
        dense: Callable[[], torch.Tensor],
    ) -> Choice:
        """For all experts together, of a range of tokens: up to the next eighth of a power of 2.

        Args:
            size: N K of an expert.
            tokens: of all experts.
        """
        step = max(1 << max(tokens.bit_length() - 4, 0), TILE)
        rounded = -(-tokens // step) * step
        known = self._choices.get((name, rounded))
        if known is None:
            chooser = self._chooser or shared_chooser(self._master.device)
            n, k = self._packed[0].shape
            key = f"{self._experts} experts, {name} T {rounded}, N {n}, K {k}, {self._master.dtype}"
            known = chooser.choose(key, 2 * size * tokens, sparse, dense)
            self._choices[name, rounded] = known
        return known

    def _weights(self) -> torch.Tensor:
        """W~ `(E, N, K)` where a dense GEMM needs it, made once a step at most."""
        if not self._is_dense:
            pruned = effective(self._master, self._projected)
            if self._effective is None:
                self._effective = pruned
            else:
                self._effective.copy_(pruned)
            self._w_NK, self._is_dense = self._effective, True
        return super()._weights()

    def _of_grad_input(self) -> torch.Tensor:
        if not self._recipe.double_pruned:
            return self._weights()
        return torch.stack([unpack24(packed).t() for packed in self._packed_t])


def each_product(
    packed: Sequence[Packed24], a: torch.Tensor, counts: Sequence[int], algorithm: int
) -> torch.Tensor:
    """`a_e @ W_e^T` of every expert, `(T, N)`; rows of 64 more or less are one product.

    Args:
        packed: W of each expert.
        a: `(T, K)`, sorted by expert.
        counts: rows of each.
    """
    total, width = a.shape[0], packed[0].shape[0]
    z = a.new_empty(total + TILE, width)
    start = 0
    for weight, count in zip(packed, counts, strict=True):
        if not count:
            continue
        end = start + -(-count // TILE) * TILE
        rows = a[start:end]
        if len(rows) < end - start:
            rows = pad(rows, (0, 0, 0, end - start - len(rows)))
        # Rows beyond the expert's are the next one's, who writes them after it.
        spmm24(weight, rows, algorithm=algorithm, out=z[start:end])
        start += count
    return z[:total]


def by_expert(
    packed: Packed24, experts: int, dim: int, before: Sequence[Packed24]
) -> list[Packed24]:
    """The packed weights of each expert, each in one buffer, of those of all in one.

    Args:
        packed: of the stacked weight `(E N, K)`, or of its transpose `(K, E N)`; 16 bits.
        dim: along which experts follow each other.
        before: what an earlier call gave, to be filled in place; empty: new memory.
    """
    rows, columns = packed.shape
    n, k = (rows // experts, columns) if dim == 0 else (rows, columns // experts)
    size = n * k  # bytes of the values of one expert: half of its entries, of 2 bytes
    if not before:
        place = packed.values.device
        buffer = torch.empty(experts, size + n * k // 8, dtype=torch.uint8, device=place)
        before = [
            Packed24(
                one[:size].view(packed.dtype).view(n, k // 2),
                one[size:],
                (n, k),
                packed.dtype,
                packed.scale,
            )
            for one in buffer
        ]
    first = before[0].values
    stride = size + n * k // 8
    whole = first.view(torch.uint8).as_strided((experts, stride), (stride, 1), 0)
    values, metadata = whole[:, :size], whole[:, size:]
    if dim == 0:
        values.copy_(packed.values.view(torch.uint8).view(experts, size))
        metadata.copy_(packed.metadata.view(experts, -1))
    else:
        apart = packed.values.view(n, experts, k // 2).transpose(0, 1)
        values.unflatten(1, (n, k)).view(packed.dtype).copy_(apart)
        blocks = packed.metadata.view(n // TILE, experts, -1).transpose(0, 1)
        metadata.unflatten(1, (n // TILE, -1)).copy_(blocks)
    return list(before)


def refusal(
    weight: torch.Tensor, experts: int, channels: tuple[ShardSlice, ...], whole: str | None
) -> str | None:
    """Why the sparse tensor cores cannot compute the experts, or None when they can.

    Args:
        weight: stacked.
        channels: of one expert.
        whole: why they could not compute it as one linear.
    """
    rows = weight.shape[0] // experts
    if rows % TILE or any(one.length % TILE for one in channels):
        return f"an expert's shard is ({rows}, {weight.shape[1]}), expected multiples of {TILE}"
    return whole
