"""What the sparse linears of one model share: recipe, clock, and when a step is over.

No call is needed to count steps. An optimizer that steps leaves a note, and the next forward pass
begins the next step. So several optimizers, one a parameter included, make one step together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megasparse.fp8 import Scaling
from megasparse.sparsity import schedule
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.recipe import SparsityRecipe


@dataclass
class Run:
    """Shared by the layers and their handle.

    Attributes:
        recipe: the method.
        clock: seed, length and step.
        monitor: keep masks and flips in dense phases too.
        scaling: of FP8 operands, or None.
        group: the data-parallel ranks; None: all of the default group, where there is one.
        stepped: an optimizer has stepped since the last forward pass.
    """

    recipe: SparsityRecipe
    clock: Clock
    monitor: bool = True
    scaling: Scaling | None = None
    group: dist.ProcessGroup | None = None
    stepped: bool = False

    def begin_forward(self) -> None:
        """Begin the next step, if an optimizer has stepped; not while gradients are computed.

        Layers that are recomputed run in the backward pass, where some optimizers step already.
        """
        if self.stepped and torch._C._current_graph_task_id() == -1:
            self.finish_step()

    def finish_step(self) -> None:
        """The step under way is over, if an optimizer has stepped."""
        if not self.stepped:
            return
        self.stepped = False
        self.clock.advance()
        if self.scaling is None:
            return
        self.scaling.finish_step()
        # Current scaling learns on the host what products may assume; that waits for the device,
        # so it is asked rarely.
        step = self.clock.step
        if not self.scaling.host_follows and step & (step - 1) == 0:
            self.scaling.assume()

    @property
    def sparse_now(self) -> bool:
        """Whether the step under way is in the sparse phase."""
        return schedule.is_sparse_step(self.recipe, self.clock.step, self.clock.train_iters)

    @property
    def regulariser(self) -> str:
        """How the step under way decays masked weights."""
        span = schedule.span_at(self.recipe, self.clock.step, self.clock.train_iters)
        return span.recipe.regulariser

    def masked_decay(self) -> float:
        """lambda of the step under way."""
        return schedule.masked_decay(self.recipe, self.clock.step, self.clock.train_iters)

    def seed(self, layer: int, number: int) -> int:
        """Of a layer's draws.

        Args:
            layer: tells its draws from another layer's.
            number: of this rank's backward passes through the layer in the step.
        """
        rank, world = self.place()
        self.clock.micro_batch = number * world + rank
        return self.clock.mvue_seed(layer)

    def place(self) -> tuple[int, int]:
        """Rank and size of the data-parallel group."""
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(self.group), dist.get_world_size(self.group)
