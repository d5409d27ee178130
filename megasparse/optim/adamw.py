"""AdamW with a masked decay, on the gradient (FST, SR-STE) or decoupled from momentum (AST).

The update rules are those of `kernels/masked_adamw/`. Weights without a mask take AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from megasparse.kernels import AdamW, masked_adamw_
from megasparse.kernels.masked_adamw.arguments import APPLIES, CLIP, DECAY
from megasparse.optim.masked_decay import Piece

# Groups of experts that expert-parallel ranks share: those without a mask, and those with one.
EXPERT_GROUPS = ("experts", "masked experts")
# The pieces of one of the optimizer's tensors, in order and without gaps.
Pieces = Callable[[torch.Tensor], Sequence[Piece]]


def _on_host(number: float | torch.Tensor) -> float:
    """A number on a CPU; of one on a GPU nothing is known here, and it is not waited for."""
    return math.nan if isinstance(number, torch.Tensor) and number.is_cuda else float(number)


def _at_once(update: Callable[[], None]) -> None:
    update()


class MaskedAdamW(torch.optim.AdamW):
    """AdamW that asks before it steps, and decays the masked pieces of its tensors.

    The moments, and their names, are those of torch's AdamW. One pass over the memory does all of
    it (`kernels/masked_adamw/`).

    Args:
        params: parameter groups; float32.
        before_step: called with the optimizer once gradients are final but for `clip`; returning
            False leaves everything as it is.
        pieces: of a tensor, with the masks that they are decayed by; None: no masks.
        decoupled: the decay joins the momentum (AST, CAST) instead of the gradient; an attribute,
            too, that `before_step` may set.
        of_sign: it is of the weight's sign (CAST).
        options: torch.optim.AdamW's (lr, betas, eps, weight_decay).

    Attributes:
        clip: what gradients are multiplied by first; a 0-d float64 tensor where the device alone
            knows.
        decay: lambda of the step; a tensor as `clip`.
        kept: what of the momentum stays beside a decay `of_sign`.
        applies: 0-d bool on the device: whether the step is made at all; None: it is.
        copies: of tensors, by id, flat: get the new values, in their own dtype.
        run: runs the update, which finds everything at the addresses of the step before.
    """

    def __init__(
        self,
        params: Iterable[Any],
        before_step: Callable[[torch.optim.Optimizer], bool],
        pieces: Pieces | None = None,
        decoupled: bool = False,
        of_sign: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self._before_step, self._pieces, self.decoupled = before_step, pieces, decoupled
        self._of_sign = of_sign
        self.clip: float | torch.Tensor = 1.0
        self.decay: float | torch.Tensor = 0.0
        self.kept = 1.0
        self.applies: torch.Tensor | None = None
        self.copies: dict[int, torch.Tensor] = {}
        self.run: Callable[[Callable[[], None]], None] = _at_once
        self._now: list[tuple[torch.Tensor, AdamW]] = []
        self._derived: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step over all groups (ZeRO calls it group by group)."""
        self._now = []
        if not self._before_step(self):
            return
        self._now = [
            (tensor, self._numbers(group, tensor))
            for group in self.param_groups
            for tensor in group["params"]
            if tensor.grad is not None
        ]
        if self._now and self._now[0][0].is_cuda:
            self._send([numbers.derived() for _, numbers in self._now])
        elif self.applies is not None and not self.applies:
            return
        self.run(self._update)

    def retract(self) -> None:
        """The last step did not apply: it does not count."""
        for tensor, numbers in self._now:
            self.state[tensor]["step"] -= 1
            if numbers.step == 1:
                del self.state[tensor]  # as if the step had never been

    def _numbers(self, group: dict[str, Any], tensor: torch.Tensor) -> AdamW:
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        state["step"] += 1
        return AdamW(
            step=int(state["step"]),
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            clip=_on_host(self.clip),
            decay=_on_host(self.decay),
            decoupled=self.decoupled,
            of_sign=self._of_sign,
            kept=self.kept,
        )

    def _send(self, rows: list[list[float]]) -> None:
        """The numbers of the step to where kernels read them, without waiting for the device."""
        on_host = torch.tensor(rows).pin_memory()
        if self._derived is None or self._derived.shape != on_host.shape:
            self._derived = torch.empty_like(on_host, device=self._now[0][0].device)
        self._derived.copy_(on_host, non_blocking=True)
        known = {CLIP: self.clip, DECAY: self.decay, APPLIES: self.applies}
        for column, value in known.items():
            if isinstance(value, torch.Tensor):
                self._derived[:, column] = value

    def _update(self) -> None:
        """All tensors by the numbers of the step; it can be captured."""
        for row, (tensor, numbers) in enumerate(self._now):
            state = self.state[tensor]
            assert tensor.grad is not None
            moments = state["exp_avg"], state["exp_avg_sq"]
            flat = [t.detach().view(-1) for t in (tensor, tensor.grad, *moments)]
            copy = self.copies.get(id(tensor))
            derived = None if self._derived is None else self._derived[row]
            whole = [Piece(0, tensor.numel(), None)]
            for piece in whole if self._pieces is None else self._pieces(tensor):
                start, length, mask = piece[:3]
                of_piece, derived_of_piece = _with_decay(numbers, derived, piece.decay)
                weight, grad, exp_avg, exp_avg_sq = (t.narrow(0, start, length) for t in flat)
                own = None if copy is None else copy.narrow(0, start, length)
                masked_adamw_(
                    weight,
                    grad,
                    exp_avg,
                    exp_avg_sq,
                    of_piece,
                    mask,
                    own,
                    derived=derived_of_piece,
                )


def _with_decay(
    numbers: AdamW, derived: torch.Tensor | None, decay: torch.Tensor | None
) -> tuple[AdamW, torch.Tensor | None]:
    """The numbers of a piece that has a decay of its own, on the host or on the device."""
    if decay is None:
        return numbers, derived
    if derived is None:
        return numbers._replace(decay=numbers.decay * float(decay)), None
    derived = derived.clone()
    derived[DECAY] *= decay
    return numbers, derived


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    masked: set[int],
    weight_decay: float,
    ends: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups for AdamW: masked matrices, other matrices, and vectors (no weight decay).

    Args:
        masked: ids of the parameters with a sparsity state; a group of their own, so that ZeRO's
            flat tensors hold either only masked weights or none.
        ends: names of parameters with a learning rate of their own (the group `ends`).

    Returns:
        With `name`; and `moe`, DeepSpeed's mark, where ZeRO divides a group over the ranks that
        hold the same experts alone.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {}
    groups |= {name: [] for name in ("masked", "matrices", "vectors", "ends", *EXPERT_GROUPS)}
    for name, parameter in named_parameters:
        if not getattr(parameter, "allreduce", True):
            groups[EXPERT_GROUPS[id(parameter) in masked]].append(parameter)
        elif id(parameter) in masked:
            groups["masked"].append(parameter)
        elif name in ends:
            groups["ends"].append(parameter)
        else:
            matrix = parameter.dim() > 1 and not name.endswith(".weight_scale")
            groups["matrices" if matrix else "vectors"].append(parameter)
    return [
        {
            "params": params,
            "weight_decay": 0.0 if name == "vectors" else weight_decay,
            "name": name,
            **({"moe": True} if name in EXPERT_GROUPS else {}),
        }
        for name, params in groups.items()
        if params
    ]
