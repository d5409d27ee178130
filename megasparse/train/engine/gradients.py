"""Where the gradients of an optimizer step are added up: one flat tensor a parameter group.

BF16 gradients of many micro-batches lose their small parts when they are added up in BF16, so the
tensors are float32 by default, as Megatron's are (`--accumulate-allreduce-grads-in-fp32`). They
stay where they are over the run: captured layers add to them, and reductions take them whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch


class GradientBuffers:
    """The flat tensors, and each parameter's part of them.

    A parameter's `grad` is its part from `begin_step` on, to which autograd adds in place.

    Args:
        groups: of every parameter group its parameters, and where each begins in the flat tensor.
        sizes: of the flat tensors, in entries.
        dtype: in which gradients are added up.

    Attributes:
        flat: 1-D, one a group.
        views: of each parameter's part, in its shape.
        dtype: in which gradients are added up.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[torch.nn.Parameter, int]],
        sizes: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.flat: list[torch.Tensor] = []
        self._zeroed = self.flat  # before a step
        self.views: dict[torch.nn.Parameter, torch.Tensor] = {}
        for starts, size in zip(groups, sizes, strict=True):
            device = next(iter(starts)).device
            flat = torch.zeros(size, dtype=dtype, device=device)
            self.flat.append(flat)
            for parameter, start in starts.items():
                self.views[parameter] = flat[start : start + parameter.numel()].view_as(parameter)
                parameter.grad_dtype = dtype

    def leave(self, parameters: Collection[torch.nn.Parameter]) -> None:
        """Of these the first gradient of a step is written over what is there; zero the others."""
        views = [self.views[parameter] for parameter in parameters]
        taken = sorted((view.data_ptr(), view.numel()) for view in views)
        self._zeroed = []
        for flat in self.flat:
            base, size, at = flat.data_ptr(), flat.element_size(), 0
            inside = [(begin, n) for begin, n in taken if 0 <= begin - base < flat.numel() * size]
            for begin, length in [*inside, (base + flat.numel() * size, 0)]:
                start = (begin - base) // size
                if at < start:
                    self._zeroed.append(flat[at:start])
                at = start + length

    def begin_step(self) -> None:
        """Before the first backward pass of an optimizer step: zeros."""
        if self._zeroed:
            torch._foreach_zero_(self._zeroed)
        for parameter, view in self.views.items():
            parameter.grad = view


def one_after_the_other(
    groups: Sequence[Sequence[torch.nn.Parameter]], dtype: torch.dtype
) -> GradientBuffers:
    """Buffers in which a group's parameters lie in their order."""
    layouts, sizes = [], []
    for parameters in groups:
        starts, size = {}, 0
        for parameter in parameters:
            starts[parameter] = size
            size += parameter.numel()
        layouts.append(starts)
        sizes.append(size)
    return GradientBuffers(layouts, sizes, dtype)
