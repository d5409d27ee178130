"""The sparsity state of one weight, and its life over an optimizer step.

Master weight updated -> at the first use in a step: refresh the mask if it is due (counting flips),
project, once -> the operands serve every micro-batch, recomputation and evaluation until the next
optimizer step. Everything that a resume needs is in `export_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch

from megasparse.errors import CheckpointError
from megasparse.kernels import (
    count_flips,
    prune24_mask,
    s_ste_scale,
    soft_threshold24,
    transposable24_mask,
    weight_pack24,
)
from megasparse.kernels.patterns import decode_patterns, encode_patterns
from megasparse.log import warn_once
from megasparse.sparsity import schedule
from megasparse.sparsity.gemms import packed as packed_gemms
from megasparse.sparsity.gemms.dense import DenseGemms, ReferenceSparseGemms
from megasparse.sparsity.gemms.packed_fp8 import DenseFp8Gemms, Fp8Slots, PackedFp8Gemms
from megasparse.sparsity.gemms.protocol import LinearGemms
from megasparse.sparsity.gemms.simulated_fp8 import SimulatedFp8Gemms
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.wanda import InputSquares

# Sums a tensor over the ranks that share a weight, in place or not; identity for one rank.
Reduce = Callable[[torch.Tensor], torch.Tensor]


class SparseWeight(torch.nn.Module):
    """Mask, scale and counters of one weight `(N, K)`, and its operands for the current step.

    A module, so that it is found in the layer that owns it; its tensors are no buffers, because a
    cast of the model (`model.bfloat16()`) must not round the scale.

    Args:
        name: the weight's name in the whole model.
        recipe: what is done to the weight.
        shard: where the local weight lies in the whole.
        reduce: sums over the tensor-parallel group (the scale's dot products).
        reduce_max: largest over the tensor-parallel group (FP8 scales).
    """

    def __init__(
        self,
        name: str,
        recipe: SparsityRecipe,
        shard: WeightShard,
        reduce: Reduce | None = None,
        reduce_max: Reduce | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.recipe = recipe
        self.shard = shard
        self.mask: torch.Tensor | None = None  # bool (N, K): kept entries
        self.scale: torch.Tensor | None = None  # float32 0-d: S-STE's beta
        self.flips: torch.Tensor | None = None  # int64 0-d: entries that the last refresh changed
        self.last_refresh = -1  # step of the last refresh
        self.refreshes = 0
        self.prepared_step = -1  # step that the operands were last built for
        self.preparations_of_step = 0  # times they were built for it: once
        self.preparations = 0  # times in all
        self.probe = Probe()  # the controller gives one with the run's timer
        # Wanda's figures of the input channels, kept beside the mask.
        self.inputs = InputSquares() if recipe.mask_metric == "wanda" else None
        self.fp8: Fp8Slots | None = None  # where GEMMs are in FP8
        self.fp8_hybrid = False
        self._reduce = reduce
        self._reduce_max = reduce_max
        self._operands: tuple[tuple[int, bool], LinearGemms] | None = None
        self._nan_flag: torch.Tensor | None = None
        self._error_flag: torch.Tensor | None = None

    def gemms(self, weight: torch.Tensor, step: int, sparse: bool, monitor: bool) -> LinearGemms:
        """The GEMMs of `step`, built at its first use.

        Args:
            weight: the local master weight `(N, K)`.
            step: optimizer steps done so far.
            sparse: whether `step` is in the sparse phase.
            monitor: keep masks and flips up to date in dense phases too.
        """
        if self._operands is None or self._operands[0] != (step, sparse):
            with self.probe.timer.span("preparation"):
                gemms = self._prepare(weight.detach(), step, sparse, monitor)
            self._operands = ((step, sparse), gemms)
        return self._operands[1]

    @property
    def halved(self) -> Set[str]:
        """The GEMMs of the latest step that have run on sparse tensor cores."""
        return frozenset() if self._operands is None else self._operands[1].halved

    def invalidate(self) -> None:
        """Forget the operands: the master weight was changed from outside (a loaded checkpoint)."""
        self._operands = None

    def _prepare(self, weight: torch.Tensor, step: int, sparse: bool, monitor: bool) -> LinearGemms:
        if (sparse or monitor) and schedule.refresh_due(self.recipe, step, self.last_refresh):
            self._refresh(weight, step)
        again = step == self.prepared_step
        self.preparations_of_step = self.preparations_of_step + 1 if again else 1
        self.prepared_step = step
        self.preparations += 1
        if not sparse:
            return DenseGemms(weight) if self.fp8 is None else DenseFp8Gemms(weight, self.fp8)
        self._forget_old_scale()
        return self._sparse_gemms(weight) if self.fp8 is None else self._fp8_gemms(weight, self.fp8)

    def _sparse_gemms(self, weight: torch.Tensor) -> LinearGemms:
        """The best implementation that can compute this weight's sparse phase."""
        recipe, channels = self.recipe, self.shard.sections(0)
        reason = packed_gemms.refusal(weight, recipe, channels)
        if reason is None:
            if self._error_flag is None:
                self._error_flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
            soft = recipe.projection == "soft_threshold"
            packed, packed_t = weight_pack24(
                weight,
                None if soft else self.mask,
                threshold_scale=self._beta(weight) if soft else None,
                transposed="packed" if recipe.transposable else None,
                error_flag=self._error_flag,
                nan_flag=self._flag(weight),
            )
            assert not isinstance(packed_t, torch.Tensor)
            return packed_gemms.PackedSparseGemms(
                packed,
                packed_t,
                lambda: self.effective(weight),
                recipe,
                channels,
                self._error_flag,
                probe=self.probe,
            )
        if weight.is_cuda:
            warn_once("2:4 layers are computed by dense GEMMs, without their speed: %s", reason)
        effective = self.effective(weight)
        if recipe.simulate_fp8:
            return SimulatedFp8Gemms(effective, recipe.mvue, channels, self._reduce_max, self.probe)
        return ReferenceSparseGemms(effective, recipe.mvue, channels, self.probe)

    def _fp8_gemms(self, weight: torch.Tensor, slots: Fp8Slots) -> LinearGemms:
        soft = self.recipe.projection == "soft_threshold"
        if self._error_flag is None and weight.is_cuda:
            self._error_flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
        return PackedFp8Gemms(
            weight,
            None if soft else self.mask,
            self._beta(weight) if soft else None,
            self.recipe,
            self.shard.sections(0),
            slots,
            self.fp8_hybrid,
            self._error_flag,
            self._flag(weight),
            self.probe,
        )

    def _beta(self, weight: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            self.scale = s_ste_scale(weight, reduce=self._reduce)
        return self.scale

    def effective(self, weight: torch.Tensor) -> torch.Tensor:
        """W~ `(N, K)` of a sparse phase: `W o M`, or `beta * S(W)` (S-STE eq. of section 2.2)."""
        if self.recipe.projection == "soft_threshold":
            beta = self._beta(weight)
            projected = soft_threshold24(weight, nan_flag=self._flag(weight))
            return (projected.float() * beta).to(weight.dtype)
        assert self.mask is not None, f"{self.name}: effective() before the first refresh"
        return torch.where(
            self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device)
        )

    def effective_at(self, weight: torch.Tensor, step: int) -> torch.Tensor:
        """W~ as the GEMMs of `step` see it: the mask is refreshed before, if it is due then."""
        if schedule.refresh_due(self.recipe, step, self.last_refresh):
            self._refresh(weight, step)
        self._forget_old_scale()
        return self.effective(weight)

    def _forget_old_scale(self) -> None:
        """The next `effective` computes beta, and those after it keep it: once a step, since all
        ranks of a shard take part."""
        if self.recipe.s_ste_scale == "every_step":
            self.scale = None

    def flags(self, device: torch.device) -> torch.Tensor:
        """float64 (2,), not 0 where since the start a NaN was found in the weight, and where an
        operand that was packed was not 2:4 (a defect, not bad data)."""
        none = torch.zeros(1, dtype=torch.float64, device=device)
        found = (self._nan_flag, self._error_flag)
        return torch.cat([none if flag is None else flag.double() for flag in found])

    def _flag(self, weight: torch.Tensor) -> torch.Tensor | None:
        if not weight.is_cuda:
            return None  # the kernels raise at once
        if self._nan_flag is None:
            self._nan_flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
        return self._nan_flag

    def _refresh(self, weight: torch.Tensor, step: int) -> None:
        search = transposable24_mask if self.recipe.transposable else prune24_mask
        # Until inputs were seen their norms are unknown: the first mask is magnitude's.
        scores = weight if self.inputs is None else self.inputs.scale(weight)
        mask = search(scores, nan_flag=self._flag(weight))
        if self.mask is not None:
            self.flips = count_flips(mask, self.mask)
        self.mask = mask
        self.last_refresh = step
        self.refreshes += 1

    def export_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: pattern indices (uint8), scale, counters."""
        state = {
            "counters": torch.tensor([self.last_refresh, self.refreshes], dtype=torch.int64),
        }
        if self.mask is not None:
            state["mask"] = encode_patterns(self.mask, transposable=self.recipe.transposable)
        if self.scale is not None:
            state["scale"] = self.scale
        if self.flips is not None:
            state["flips"] = self.flips
        if self.inputs is not None:
            state.update(self.inputs.export_state())
        if self.fp8 is not None:
            state.update(self.fp8.export_state())
        return state

    def snapshot(self) -> tuple[Any, ...]:
        """What a step may change, by reference, for `restore`."""
        counts = (self.last_refresh, self.refreshes, self.prepared_step, self.preparations_of_step)
        return (self.mask, self.scale, self.flips, counts)

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Put back what `snapshot` gave."""
        self.mask, self.scale, self.flips, counts = snapshot
        self.last_refresh, self.refreshes, self.prepared_step, self.preparations_of_step = counts
        if self.inputs is not None:
            self.inputs.drop()
        self.invalidate()

    def import_state(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        """Take over what `export_state` gave; operands are rebuilt at the next use."""
        counters = state["counters"]
        if counters.shape != (2,):
            raise CheckpointError(
                f"{self.name}: counters of shape {tuple(counters.shape)}, expected (2,)"
            )
        self.last_refresh, self.refreshes = (int(value) for value in counters)
        self.mask = None
        if "mask" in state:
            shape = (self.shard.local_shape[0], self.shard.local_shape[1])
            self.mask = decode_patterns(
                state["mask"].to(device), shape, transposable=self.recipe.transposable
            )
        self.scale = state["scale"].to(device) if "scale" in state else None
        self.flips = state["flips"].to(device) if "flips" in state else None
        if self.inputs is not None:
            self.inputs.import_state(state, device)
        if self.fp8 is not None:
            self.fp8.import_state(state)
        self.invalidate()
