"""SLoRB, sparse low-rank boosting (AST, section 3.5): what a 2:4 weight cannot hold, at rank K / k.

    y = x (W o M)^T + (x P^T) S^T        P (K/k, K) projection, S (N, K/k) adapter

P starts as the indicator of the groups of k neighbouring inputs, S as the mean over each group of
what was pruned, so that the sum of the effective weight `W o M + S P` over every group is W's own.
S is trained; P is too, or stays the indicator, and then it is no matrix but a sum over groups.

Tensor parallel, around the three GEMMs and their communication (`sparsity/autograd/linear.py`):

    column   S (N/p, R) with the output rows; P whole on every rank, its gradient summed
    row      S (N, R/p), P (R, K/p): x P^T is a partial sum of all R, reduced so that every rank
             keeps the R/p that its S multiplies; an untrained P is local to the rank
"""

from __future__ import annotations

from typing import Protocol

import torch

from megasparse.errors import ConfigError
from megasparse.sparsity.shard import WeightShard


class LowRankComm(Protocol):
    """What happens to the low-rank activation `(T, R)` and to P's gradient over ranks."""

    def scatter(self, h_TR: torch.Tensor) -> torch.Tensor:
        """The R that this rank's S multiplies, summed over ranks."""
        ...

    def gather(self, dh_TR: torch.Tensor) -> torch.Tensor:
        """The adjoint of `scatter`."""
        ...

    def reduce(self, dp_RK: torch.Tensor) -> torch.Tensor:
        """P's gradient from this rank's part of it."""
        ...


class LocalLowRankComm:
    """A rank that has all it needs."""

    def scatter(self, h_TR: torch.Tensor) -> torch.Tensor:
        return h_TR

    def gather(self, dh_TR: torch.Tensor) -> torch.Tensor:
        return dh_TR

    def reduce(self, dp_RK: torch.Tensor) -> torch.Tensor:
        return dp_RK


class LowRankBranch:
    """The low-rank branch of one linear layer.

    Args:
        group_size: k, neighbouring inputs that share a column of S.
        comm: over the tensor-parallel group.
    """

    def __init__(self, group_size: int, comm: LowRankComm | None = None) -> None:
        self._group_size = group_size
        self._comm = comm or LocalLowRankComm()

    def project(self, x_TK: torch.Tensor, p_RK: torch.Tensor | None) -> torch.Tensor:
        """`x P^T` `(T, R)`, what this rank's S multiplies."""
        if p_RK is None:
            return x_TK.unflatten(1, (-1, self._group_size)).sum(-1)
        return self._comm.scatter(x_TK @ p_RK.t())

    def grad_hidden(self, dz_TN: torch.Tensor, s_NR: torch.Tensor) -> torch.Tensor:
        """`dZ S` as the projection's backward needs it."""
        return self._comm.gather(dz_TN @ s_NR)

    def add_grad_input_(
        self, dx_TK: torch.Tensor, dh_TR: torch.Tensor, p_RK: torch.Tensor | None
    ) -> torch.Tensor:
        """`dX += dH P`, in place."""
        if p_RK is not None:
            return dx_TK.addmm_(dh_TR, p_RK)
        dx_TK.unflatten(1, (-1, self._group_size)).add_(dh_TR.unsqueeze(-1))
        return dx_TK

    def grad_projection(self, dh_TR: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        """`dP = dH^T X` over all ranks that share P."""
        return self._comm.reduce(dh_TR.t() @ x_TK)


def adapter_shard(weight: WeightShard, group_size: int) -> WeightShard:
    """Where the local S lies in the whole `(N, K / k)`.

    Raises:
        ConfigError: k does not divide the inputs of a shard.
    """
    inputs = weight.local_shape[1]
    if inputs % group_size:
        raise ConfigError(
            f"slorb_k {group_size} does not divide the {inputs} inputs of a shard of "
            f"{weight.global_shape[0]} x {weight.global_shape[1]} over {weight.world} ranks"
        )
    rows, columns = weight.global_shape
    shape = (rows, columns // group_size)
    return WeightShard(shape, weight.dim, weight.rank, weight.world, weight.parts)


def projection_shard(weight: WeightShard, group_size: int) -> WeightShard:
    """Where the local P lies in the whole `(K / k, K)`: split with the inputs, or whole."""
    columns = weight.global_shape[1]
    shape = (columns // group_size, columns)
    if weight.dim == 1:
        return WeightShard(shape, 1, weight.rank, weight.world, weight.parts)
    return WeightShard(shape)


def initial_adapter(weight: torch.Tensor, mask: torch.Tensor, group_size: int) -> torch.Tensor:
    """S `(N, K / k)`: of each group, the sum of its pruned entries over k; dtype of the weight."""
    pruned = torch.where(mask, torch.zeros((), device=weight.device), weight.float())
    return pruned.unflatten(1, (-1, group_size)).mean(-1).to(weight.dtype)


def initial_projection(shard: WeightShard, group_size: int) -> torch.Tensor:
    """The local P `(R, K_local)` float32: 1 where a row's group holds the column."""
    rows, columns = shard.global_shape
    groups = torch.arange(columns) // group_size
    return shard.slice_of((torch.arange(rows)[:, None] == groups).float())


def fold(effective: torch.Tensor, s_NR: torch.Tensor, p_RK: torch.Tensor | None) -> torch.Tensor:
    """`W o M + S P` `(N, K)`: one dense matrix that computes the boosted layer (no longer 2:4).

    Args:
        effective: `W o M` `(N, K)`.
        p_RK: None for the indicator of the groups.
    """
    if p_RK is not None:
        return effective + s_NR @ p_RK
    group_size = effective.shape[1] // s_NR.shape[1]
    return effective + s_NR.repeat_interleave(group_size, 1)
