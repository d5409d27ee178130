"""The only door to DeepSpeed: process start, its configuration, and one optimizer step.

DeepSpeed's dict is derived from the RunConfig. Its user-visible part (`--deepspeed_config`) may add
what megasparse does not own; what it does own is never taken from there.
"""

from __future__ import annotations

import logging as python_logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megasparse.config import RunConfig, gradient_accumulation_steps
from megasparse.megatron.grid import Grid, ModelParallelUnit, collective_timeout
from megasparse.optim.adamw import MaskedAdamW, parameter_groups
from megasparse.optim.lr import learning_rate
from megasparse.optim.masked_decay import MaskedDecay
from megasparse.sparsity.controller import SparsityController
from megasparse.train import zero
from megasparse.train.faults import Faults
from megasparse.train.numerics import StepGuard
from megasparse.train.process import join_group

# Without a GPU DeepSpeed must not look for one, and the op that it would compile for shared-memory
# collectives (30 s, again whenever the environment changes) is of no use to training.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# One hardware queue, so that collectives start in the order in which they were issued and overlap
# with the GEMMs issued after them (Megatron's requirement for tensor parallelism).
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
# Megatron uses names of collectives that newer torch versions call differently.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
python_logging.getLogger("DeepSpeed").setLevel(python_logging.ERROR)


def start_process(timeout_minutes: float) -> tuple[torch.device, tuple[str, int] | None]:
    """Join the process group that the launcher described.

    Returns:
        The device of this rank, and where the group's store listens (`join_group`).
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    address = join_group(device, collective_timeout(timeout_minutes))
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)  # finds the group
    return device, address


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dict for a resolved configuration."""
    train, stage = config.train, config.parallel.zero_stage
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps(config, world_size),
        # Without ZeRO the norm is computed and clipped here (`_Clipper`): DeepSpeed does not
        # report it then.
        "gradient_clipping": train.clip_grad if stage else 0.0,
        "bf16": {"enabled": train.bf16},
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


class LanguageModelLoss(torch.nn.Module):
    """The model with its loss: the mean over the tokens that count.

    A batch is what `train.data.batches` yields.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """0-d float32: mean cross entropy over the tokens with loss_mask 1."""
        losses = self.model(
            batch["tokens"],
            batch["position_ids"],
            batch.get("attention_mask"),
            labels=batch["labels"],
        )
        mask = batch["loss_mask"]
        return (losses.float() * mask).sum() / mask.sum().clamp(min=1.0)


@dataclass
class StepResult:
    """One optimizer step, over all ranks: mean loss, gradient norm before clipping, rate used.

    Loss and norm are None for a step that was left out.
    """

    loss: float | None
    grad_norm: float | None
    lr: float


class Engine:
    """DeepSpeed's engine around a model, with masked decay between clipping and AdamW.

    Args:
        config: resolved.
        grid: this rank's place.
        model: built and sparsified.
        controller: the model's sparsity.
        faults: to be injected; none by default.
        tick: told about every micro-batch.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        model: torch.nn.Module,
        controller: SparsityController,
        faults: Faults | None = None,
        tick: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.grid, self.model, self.controller = config, grid, model, controller
        train = config.train
        recipe = controller.recipe
        decay = MaskedDecay(controller)
        self._on_gradient = decay if recipe.regulariser == "masked_decay" else None
        decoupled = recipe.regulariser == "decoupled_masked_decay"
        self.optimizer = MaskedAdamW(
            parameter_groups(
                model.named_parameters(),
                {id(weight) for _, weight in controller.weights},
                train.weight_decay,
            ),
            before_step=self._before_step,
            decoupled_decay=decay.term if decoupled else None,
            lr=train.lr,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_eps,
        )
        self._norm_without_zero: float | None = None
        self._reduce_replicated_gradients()
        self._engine, *_ = deepspeed.initialize(
            model=LanguageModelLoss(model),
            optimizer=self.optimizer,
            config=deepspeed_config(config, grid.world),
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
        # Where the parameters lie in the optimizer's tensors, now that ZeRO has made its own.
        self.fragments = zero.fragments(model.named_parameters(), self.optimizer)
        decay.attach(self.fragments)
        self._faults, self._tick = faults or Faults([], grid.rank), tick
        self.guard = StepGuard(grid, model, self._engine.module, controller, self._faults)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return gradient_accumulation_steps(self.config, self.grid.world)

    def train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> StepResult:
        """Forward, backward and update over one global batch; advances the clock.

        Raises:
            NonFiniteStep: the loss or the gradient norm is not finite; weights, moments, masks and
                generators are as before the step, and so is the clock.
        """
        clock = self.controller.clock
        rate = learning_rate(self.config.train, clock.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._engine.train()
        self.guard.begin()
        total = torch.zeros((), device=self.grid.device)
        for number in range(self.accumulation_steps):
            self._tick(f"step {clock.step + 1}, micro-batch {number}")
            clock.micro_batch = number * self.grid.dp_size + self.grid.dp_rank
            self._faults.at("data")
            batch = self.guard.keep(next(batches), clock.micro_batch)
            self._faults.at("forward")
            loss = self.guard.poisoned(self._engine(batch))
            total += loss.detach()
            self._faults.at("backward")
            self._engine.backward(loss)
            if number == self.accumulation_steps - 1:
                self.guard.check_loss(total)
                self._faults.at("optimizer")
            self._engine.step()
        mean = self.grid.mean_over_dp(total / self.accumulation_steps)
        norm = self._grad_norm()
        self.guard.end(rate, norm)
        clock.step += 1
        return StepResult(float(mean), norm, rate)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterator[dict[str, torch.Tensor]],
        iterations: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """Mean loss over `iterations` micro-batches of every data-parallel rank.

        Args:
            interrupted: asked before every micro-batch, the same answer on all ranks; ends the
                evaluation without a result.
        """
        self._engine.eval()
        self._faults.step = self.controller.clock.step
        total = torch.zeros((), device=self.grid.device)
        for number in range(iterations):
            self._tick(f"evaluation, micro-batch {number}")
            self._faults.at("evaluate")
            if interrupted():
                return None
            total += self._engine(next(batches))
        return float(self.grid.mean_over_dp(total / iterations))

    def _before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Runs inside the optimizer, on final gradients: clip without ZeRO, then masked decay."""
        if not self.guard.loss_is_finite:
            return False
        if not self.config.parallel.zero_stage and not self._clip():
            return False
        if self._on_gradient is not None:
            self._on_gradient.add_to_gradients(optimizer)
        return True

    def _clip(self) -> bool:
        """Global norm over all ranks and clipping, for whole (not ZeRO) gradients.

        Entries that are sharded over tensor-parallel ranks count once each, replicated ones once.
        """
        sharded = torch.zeros((), device=self.grid.device)
        replicated = torch.zeros((), device=self.grid.device)
        gradients = [p for p in self.model.parameters() if p.grad is not None]
        for parameter in gradients:
            assert parameter.grad is not None
            square = parameter.grad.float().square().sum()
            if getattr(parameter, "tensor_model_parallel", False):
                sharded += square
            else:
                replicated += square
        norm = float((self.grid.sum_over_tp(sharded) + replicated).sqrt())
        self._norm_without_zero = norm
        limit = self.config.train.clip_grad
        if not norm < float("inf"):
            return False
        if limit and norm > limit:
            for parameter in gradients:
                assert parameter.grad is not None
                parameter.grad.mul_(limit / (norm + 1e-6))
        return True

    def _grad_norm(self) -> float:
        if not self.config.parallel.zero_stage:
            assert self._norm_without_zero is not None
            return self._norm_without_zero
        return float(self._engine.get_global_grad_norm())

    def _reduce_replicated_gradients(self) -> None:
        """Under sequence parallelism, sum gradients of replicated parameters over TP.

        Each rank sees a part of the sequence, so its gradient of a norm or a row-parallel bias is a
        partial sum.
        """
        if not self.config.parallel.sequence_parallel:
            return
        for parameter in self.model.parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(lambda grad: self.grid.sum_over_tp(grad.clone()))


def stop_process() -> None:
    """Leave the process group after a run that ended well."""
    if dist.is_initialized():
        dist.destroy_process_group()
