"""Losses of a student and its teacher on logits whose vocabulary is divided over ranks.

Forward KL of one token at temperature T (AST, section "distillation"; Hinton's T^2 keeps the size
of the gradient):

    KL = T^2 sum_v p_v (log p_v - log q_v),   p = softmax(teacher / T),   q = softmax(student / T)
    dKL / dstudent_v = T (q_v - p_v)

No logits are gathered. With d the logits over T less their largest value, every rank sums

    Z_p = sum exp(d_p),   Z_q = sum exp(d_q),   A = sum exp(d_p) (d_p - d_q)

over its own columns; one MAX and one SUM reduction later KL = T^2 (A / Z_p + log(Z_q / Z_p)).
Columns that only pad the vocabulary take no part, and get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        temperature: float,
        valid: int,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        high = torch.promote_types(student.dtype, torch.float32)
        ours, theirs = (t[..., :valid].to(high) / temperature for t in (student, teacher))
        largest = torch.full(
            (2, *student.shape[:-1]), -torch.inf, dtype=high, device=student.device
        )
        if valid:
            largest = torch.stack([ours.amax(-1), theirs.amax(-1)])
        if group is not None and group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        ours.sub_(largest[0].unsqueeze(-1))
        theirs.sub_(largest[1].unsqueeze(-1))
        p, difference = theirs.exp(), theirs.sub_(ours)
        q = ours.exp_()
        sums = torch.stack([p.sum(-1), q.sum(-1), (p * difference).sum(-1)])
        if group is not None and group.size() > 1:
            dist.all_reduce(sums, group=group)
        z_p, z_q, cross = sums
        # The gradient is kept instead of what it is made of: one tensor of the size of the logits.
        gradient = torch.zeros_like(student)
        q.div_(z_q.unsqueeze(-1)).sub_(p.div_(z_p.unsqueeze(-1)))
        gradient[..., :valid] = q.mul_(temperature)
        ctx.save_for_backward(gradient)
        # One logarithm of a number near 1 instead of two large ones: KL is small beside them.
        return temperature**2 * (cross / z_p + (z_q / z_p).log())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        scaled = gradient * grads[0].unsqueeze(-1).to(gradient.dtype)
        return scaled, None, None, None, None


def vocab_parallel_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Forward KL(teacher || student) of every token, with gradients for the student.

    Args:
        student, teacher: logits `(..., V / tp)`, this rank's columns; of any float dtype each.
        temperature: T.
        vocab_size: columns of the whole vocabulary that are tokens; None: all.
        group: tensor parallel; None for one rank.

    Returns:
        `(...)`, float32 (float64 of float64 logits).
    """
    width = student.shape[-1]
    first = 0 if group is None else group.rank() * width
    valid = width if vocab_size is None else min(max(vocab_size - first, 0), width)
    return _ForwardKL.apply(student, teacher.detach(), temperature, valid, group)
