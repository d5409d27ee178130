"""The sparsity state of one weight, and its life over an optimizer step.

Master weight updated -> before its first use in a step: refresh the mask if it is due (counting
flips), project, once -> the operands serve every micro-batch, recomputation and evaluation until
the next optimizer step. Everything that a resume needs is in `export_state`.

The way goes down only: the state projects (`Projected`), `operands.choose` has made the GEMMs for
the phase, and they make their operands of it. Mask, scale and operands stay where they are in
memory, so that a captured pass finds those of every later step.
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.errors import CheckpointError
from megasparse.fp8.scale import Reduce
from megasparse.kernels import prune24_mask, replace_mask_, s_ste_scale, transposable24_mask
from megasparse.kernels.patterns import decode_patterns, encode_patterns, unpack_fours
from megasparse.sparsity import operands, schedule
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gradient_sum import GradientSum
from megasparse.sparsity.own_decay import OwnDecay
from megasparse.sparsity.probe import Probe
from megasparse.sparsity.projection import Projected, effective
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.shard import ALL_TOKENS, TokenShare, WeightShard
from megasparse.sparsity.wanda import InputNorms


class SparseWeight(torch.nn.Module):
    """Mask, scale and counters of one weight `(N, K)`, and its operands for the current step.

    A module, so that it is found in the layer that owns it; its tensors are no buffers, because a
    cast of the model (`model.bfloat16()`) must not round the scale.

    Args:
        name: the weight's name in the whole model.
        recipe: the run's, whose phases say what is done to the weight.
        shard: where the local weight lies in the whole.
        reduce: sums over the tensor-parallel group (the scale's dot products).
        reduce_max: largest over the ranks that share a micro-batch's activations (FP8 scales).
        tokens: which tokens of a micro-batch are on this rank.
        experts: whose weights are stacked here, each with a scale of its own; None: no experts'.
    """

    def __init__(
        self,
        name: str,
        recipe: SparsityRecipe,
        shard: WeightShard,
        reduce: Reduce | None = None,
        reduce_max: Reduce | None = None,
        tokens: TokenShare = ALL_TOKENS,
        experts: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.recipe, self.shard, self.experts = name, recipe, shard, experts
        self.active_share = 1.0  # of its entries, that compute a token: of experts the chosen ones
        self.mask: torch.Tensor | None = None  # bool (N, K): kept entries
        self.scale: torch.Tensor | None = None  # float32 0-d, of experts (E,): S-STE's beta
        self.flips: torch.Tensor | None = None  # int64 0-d: entries that the last refresh changed
        self.decay: OwnDecay | None = None  # where each weight has its own lambda
        self.train_iters: int | None = None  # of the run; None: one phase
        self.now = next((p.recipe for p in recipe.phases if p.recipe.is_sparse), recipe)
        self._made_for = self.now  # `now` is the latest step's phase, this the sparse GEMMs'
        self._rescaled = any(p.recipe.s_ste_scale == "every_step" for p in recipe.phases)
        self.mask_transposable = False
        self.last_refresh, self.refreshes = -1, 0  # step of the last refresh, and their number
        self.prepared_step = -1  # step that the operands were last built for
        self.preparations_of_step = self.preparations = 0  # times for it (once), and in all
        self.probe = Probe()  # the controller gives one with the run's timer
        self.inputs = InputNorms() if recipe.mask_metric == "wanda" else None  # beside the mask
        self.quantizers: OperandQuantizers | None = None  # where GEMMs are in FP8
        self.fp8_hybrid = self.grouped = False  # grouped: experts' dense GEMMs are one launch
        self.total: GradientSum | None = None  # of gradients, from the next step on; None: autograd
        self._reduce, self._reduce_max, self._tokens = reduce, reduce_max, tokens
        self._gemms: dict[bool, Any] = {}  # by phase: dense, sparse; LinearGemms or ExpertGemms
        self._ready: tuple[int, bool] | None = None  # step and phase that the operands are of
        self._nan_flag: torch.Tensor | None = None
        self._error_flag: torch.Tensor | None = None
        # Of the latest refresh, what was before: the mask, four entries a byte, and the flips.
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None
        self._refreshed = False  # in the step under way
        self.moves = 0  # times that mask, scale or operands may have got other addresses

    def gemms(self, weight: torch.Tensor, step: int, sparse: bool, monitor: bool) -> Any:
        """The GEMMs of `step`, with operands made at its first use.

        Args:
            weight: the local master weight `(N, K)`.
            step: optimizer steps done so far.
            sparse: whether `step` is in the sparse phase.
            monitor: keep masks and flips up to date in dense phases too.
        """
        if self._ready != (step, sparse):
            with self.probe.timer.span("preparation"):
                due = self.refresh_is_due(step, sparse, monitor)
                if due:
                    self.refresh(weight)
                self.begin_step(weight, step, sparse, due)
                self.refill(weight, sparse)
        elif self.probe.waits and self.quantizers is not None:
            self.refill(weight, sparse)  # made by an evaluation, before anyone asked
        return self._gemms[sparse]

    def keep_mask(self, weight: torch.Tensor, step: int) -> None:
        """Search the mask if it is due, where GEMMs are dense and it says what decays."""
        if self._enter(step):
            self.refresh(weight)
            self._count_refresh(step)

    def refresh_is_due(self, step: int, sparse: bool, monitor: bool) -> bool:
        """Whether the mask is to be searched anew before the operands of `step` are made."""
        return self._enter(step) and (sparse or monitor)

    def begin_step(self, weight: torch.Tensor, step: int, sparse: bool, refreshed: bool) -> None:
        """See to it that `refill` has what it needs, and count.

        Args:
            refreshed: whether the mask was refreshed for this step.
        """
        if refreshed:
            self._count_refresh(step)
        again = step == self.prepared_step
        self.preparations_of_step = self.preparations_of_step + 1 if again else 1
        self.prepared_step = step
        self.preparations += 1
        if sparse and self._made_for != self.now and self._gemms.pop(True, None) is not None:
            self.moves += 1
        if sparse not in self._gemms:
            self._make_flags(weight)
            self._made_for = self.now if sparse else self._made_for
            how = self.quantizers, self.fp8_hybrid, self._reduce_max, self.probe
            whose = self._tokens, self.experts, self.grouped
            made = operands.choose(weight, self.now, self.shard, sparse, *how, *whose)
            self._gemms[sparse] = made
        self._gemms[sparse].total = self.total
        self._ready = (step, sparse)

    def refill(self, weight: torch.Tensor, sparse: bool) -> None:
        """Make the operands of the step that has begun; the part that can be captured."""
        weight = weight.detach()
        self.probe.waits = False
        self._gemms[sparse].refill(weight, self.project(weight) if sparse else None)

    @property
    def ready_for(self) -> tuple[int, bool] | None:
        """Step and phase that the operands are of; None: of none."""
        return self._ready

    @property
    def ran_sparse(self) -> frozenset[str]:
        """The GEMMs that have run on sparse tensor cores in the phase of the latest step."""
        if self._ready is None:
            return frozenset()
        return frozenset(self._gemms[self._ready[1]].ran_sparse)

    def invalidate(self) -> None:
        """Forget the operands: the master weight was changed from outside (a loaded checkpoint)."""
        self._ready = None

    def forget_operands(self) -> None:
        """Choose the GEMMs anew too: the weight comes in another precision."""
        self._gemms.clear()
        self.moves += 1
        self.invalidate()

    def keep_scale(self, scale: float, device: torch.device) -> None:
        """Take over a frozen beta, in place of computing one at the first sparse step."""
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.moves += 1
        self.invalidate()

    def project(self, weight: torch.Tensor) -> Projected:
        """The projection of a sparse phase's step; computes beta where it is due, with all ranks
        of the shard."""
        if self.now.projection != "soft_threshold":
            assert self.mask is not None, f"{self.name}: projected before the first refresh"
            return Projected(self.mask, None, self._nan_flag, self._error_flag)
        if self.scale is None:
            self.scale = self._beta(weight)
        elif self.now.s_ste_scale == "every_step":
            self.scale.copy_(self._beta(weight))
        return self._projected()

    def _beta(self, weight: torch.Tensor) -> torch.Tensor:
        beta = s_ste_scale(weight, reduce=self._reduce, experts=self.experts or 1)
        return beta.view(() if self.experts is None else self.experts)

    def _projected(self) -> Projected:
        """The projection that is there already."""
        if self.now.projection == "soft_threshold":
            return Projected(None, self.scale, self._nan_flag, self._error_flag)
        return Projected(self.mask, None, self._nan_flag, self._error_flag)

    def effective(self, weight: torch.Tensor) -> torch.Tensor:
        """W~ `(N, K)` of a sparse phase, as the operands of the latest step have it."""
        self._make_flags(weight)
        known = self._projected()
        return effective(weight, self.project(weight) if known[:2] == (None, None) else known)

    def effective_at(self, weight: torch.Tensor, step: int) -> torch.Tensor:
        """W~ as the GEMMs of `step` see it: the mask is refreshed before, if it is due then."""
        self._make_flags(weight)
        self.keep_mask(weight, step)
        return effective(weight, self.project(weight))

    def flags(self, device: torch.device) -> torch.Tensor:
        """float64 (2,), not 0 where since the start a NaN was found in the weight, and where an
        operand that was packed was not 2:4 (a defect, not bad data)."""
        none = torch.zeros(1, dtype=torch.int32, device=device)
        found = (self._nan_flag, self._error_flag)
        return torch.cat([none if flag is None else flag for flag in found]).double()

    def _make_flags(self, weight: torch.Tensor) -> None:
        """On a GPU kernels raise flags; on a CPU they raise at once."""
        if weight.is_cuda and self._nan_flag is None:
            self._nan_flag, self._error_flag = (
                torch.zeros(1, dtype=torch.int32, device=weight.device) for _ in range(2)
            )

    def _enter(self, step: int) -> bool:
        """Be in the phase of `step`; whether the mask is due to be searched in it."""
        start = 0
        if self.train_iters is not None:
            span = schedule.span_at(self.recipe, step, self.train_iters)
            self.now, start = span.masks, span.steps.start if span.recipe.is_sparse else 0
        return schedule.refresh_due(self.now, step, self.last_refresh, start)

    def refresh(self, weight: torch.Tensor) -> None:
        """Search the mask of the weight, and count flips; it can be captured from the third on.

        What a skipped step would have to put back is kept.
        """
        weight = weight.detach()
        self.mask_transposable = self.now.transposable
        search = transposable24_mask if self.mask_transposable else prune24_mask
        self._make_flags(weight)
        # Until inputs were seen their norms are unknown: the first mask is magnitude's.
        scores = weight if self.inputs is None else self.inputs.scale(weight)
        mask = search(scores, nan_flag=self._nan_flag)
        if self.mask is None:
            self.mask = mask
            return
        if self._before is None:
            rows, columns = mask.shape
            packed = torch.empty((rows, columns // 4), dtype=torch.uint8, device=mask.device)
            self._before = packed, torch.zeros((), dtype=torch.int64, device=mask.device)
        packed, known = self._before
        flips = replace_mask_(self.mask, mask.contiguous(), packed)
        known.copy_(flips if self.flips is None else self.flips)
        if self.flips is None:
            self.flips = flips
        else:
            self.flips.copy_(flips)

    def _count_refresh(self, step: int) -> None:
        self.last_refresh = step
        self.refreshes += 1
        self._refreshed = True

    @property
    def refreshes_in_place(self) -> bool:
        """Whether a refresh finds everything that it writes, at addresses that stay."""
        return self._before is not None and self.inputs is None

    def _decoded_mask(self, patterns: torch.Tensor) -> torch.Tensor:
        """The mask, of the kind that its patterns are of."""
        rows, columns = self.shard.local_shape
        self.mask_transposable = patterns.shape[0] < rows
        return decode_patterns(patterns, (rows, columns), transposable=self.mask_transposable)

    def export_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: pattern indices (uint8), scale, counters."""
        counters = torch.tensor([self.last_refresh, self.refreshes], dtype=torch.int64)
        state = {"counters": counters}
        if self.mask is not None:
            state["mask"] = encode_patterns(self.mask, transposable=self.mask_transposable)
        if self.scale is not None:
            state["scale"] = self.scale.clone()
        if self.flips is not None:
            state["flips"] = self.flips.clone()
        for one in (self.decay, self.inputs, self.quantizers):
            if one is not None:
                state.update(one.export_state())
        return state

    def snapshot(self) -> tuple[Any, ...]:
        """What a step may change, for `restore`; of one step at a time."""
        prepared = (self.prepared_step, self.preparations_of_step, self.preparations)
        counts = (self.last_refresh, self.refreshes, self.mask_transposable, *prepared)
        scale = self.scale
        if scale is not None and self._rescaled:
            scale = scale.clone()
        self._refreshed = False
        return (self.mask is not None, scale, self.flips is not None, counts)

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Put back what `snapshot` gave."""
        had_mask, scale, had_flips, counts = snapshot
        self.last_refresh, self.refreshes, self.mask_transposable = counts[:3]
        self.prepared_step, self.preparations_of_step, self.preparations = counts[3:]
        if not had_mask and self.mask is not None:
            self.mask = None
            self.moves += 1
        elif self._refreshed:
            assert self.mask is not None and self.flips is not None and self._before is not None
            self.mask.copy_(unpack_fours(self._before[0]))
            self.flips.copy_(self._before[1])
        if not had_flips:
            self.flips = self._before = None
            self.moves += 1
        self._refreshed = False
        if scale is None or self.scale is None:
            self.moves += self.scale is not scale
            self.scale = scale
        elif self.scale is not scale:
            self.scale.copy_(scale)
        if self.inputs is not None:
            self.inputs.drop()
        if self.probe.asked:
            self.probe.ask()  # what it has measured is of no step
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
            self.mask = self._decoded_mask(state["mask"].to(device))
        self.scale = state["scale"].to(device) if "scale" in state else None
        self.flips = state["flips"].to(device) if "flips" in state else None
        for one in (self.decay, self.quantizers):
            if one is not None:
                one.import_state(state)
        if self.inputs is not None:
            self.inputs.import_state(state, device)
        self._before = None
        self.forget_operands()
