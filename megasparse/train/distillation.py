"""Distillation in a run: the loss that both engines minimise, and the teacher's place in memory.

    L = kd_loss_weight * KL(teacher || student) + lm_loss_weight * cross entropy

both as means over the tokens with loss_mask 1 (AST: 2/3 and 1/3 at temperature 2 for GPT-2, 0.5 and
1 for LLaMA-2). Evaluations measure the cross entropy alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megasparse.config import ResolvedConfig
from megasparse.log import logger
from megasparse.megatron.distillation import vocab_parallel_kl
from megasparse.megatron.grid import Grid
from megasparse.megatron.loss import masked_mean, token_cross_entropy
from megasparse.megatron.teacher import Teacher

MIB = 2**20


class Distillation:
    """The teacher and the loss against it.

    Args:
        config: of the run.
        grid: this rank's place.
        padded_vocab_size: of student and teacher.
        vocab_size: before padding; None: nothing is padding.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        grid: Grid,
        padded_vocab_size: int,
        vocab_size: int | None = None,
    ) -> None:
        self.teacher = Teacher(config, grid, padded_vocab_size)
        self._settings, self._grid, self._vocab_size = config.distillation, grid, vocab_size
        tokens = config.train.micro_batch_size * config.model.seq_length // grid.cp_size
        size = 2 if self.teacher.dtype == torch.bfloat16 else 4
        self._logits_bytes = size * tokens * padded_vocab_size // grid.tp_size
        self._sums = torch.zeros(3, device=grid.device)

    def describe(self, where: str) -> None:
        """Log how much memory the teacher takes, and where it is from.

        Args:
            where: the folder of its weights.
        """
        logger.info(
            "teacher from %s: %.1f MiB of %s weights on this rank, and %.1f MiB of logits a "
            "micro-batch where the loss is",
            where,
            self.teacher.bytes_here / MIB,
            self.teacher.stored,
            self._logits_bytes / MIB,
        )

    def loss(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
        divisor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """0-d float32: the weighted sum, for one micro-batch.

        Args:
            student, teacher: logits `(a, b, V / tp)`; the student's may be overwritten.
            labels: `(a, b)` int64.
            mask: `(a, b)` float32, of the tokens that count.
            divisor: of `masked_mean`.
        """
        settings = self._settings
        divergences = vocab_parallel_kl(
            student, teacher, settings.kd_temperature, self._vocab_size, self._grid.tp_group
        )
        kd = masked_mean(divergences, mask, divisor)
        # After the divergence, which keeps nothing of the logits: this overwrites them.
        lm = masked_mean(token_cross_entropy(student, labels), mask, divisor)
        self._sums += torch.stack([kd.detach(), lm.detach(), torch.ones_like(lm)])
        return settings.kd_loss_weight * kd + settings.lm_loss_weight * lm

    def take_parts(self) -> dict[str, float]:
        """Mean KL and cross entropy since the last call, over all ranks; a collective call."""
        total, self._sums = self._sums, torch.zeros_like(self._sums)
        if self._grid.world > 1:  # tensor-parallel ranks have the same, other stages nothing
            dist.all_reduce(total)
        kd, lm, count = total.tolist()
        return {"kd_loss": kd / max(count, 1.0), "lm_loss": lm / max(count, 1.0)}
