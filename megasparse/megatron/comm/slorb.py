"""Communication of SLoRB's low-rank branch over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist


class SumOfProjections:
    """SLoRB in a column-parallel layer: P is whole on every rank, each has part of its gradient."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def scatter(self, h_TR: torch.Tensor) -> torch.Tensor:
        return h_TR

    def gather(self, dh_TR: torch.Tensor) -> torch.Tensor:
        return dh_TR

    def reduce(self, dp_RK: torch.Tensor) -> torch.Tensor:
        dp_RK = dp_RK.contiguous()
        dist.all_reduce(dp_RK, group=self._group)
        return dp_RK


class SplitOverRank:
    """SLoRB in a row-parallel layer with a trained P: partial sums of all R, to a share of R."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def scatter(self, h_TR: torch.Tensor) -> torch.Tensor:
        h_RT = h_TR.t().contiguous()
        part = h_RT.new_empty(h_RT.shape[0] // self._group.size(), h_RT.shape[1])
        dist.reduce_scatter_tensor(part, h_RT, group=self._group)
        return part.t()

    def gather(self, dh_TR: torch.Tensor) -> torch.Tensor:
        dh_RT = dh_TR.t().contiguous()
        whole = dh_RT.new_empty(dh_RT.shape[0] * self._group.size(), dh_RT.shape[1])
        dist.all_gather_into_tensor(whole, dh_RT, group=self._group)
        return whole.t()

    def reduce(self, dp_RK: torch.Tensor) -> torch.Tensor:
        return dp_RK
