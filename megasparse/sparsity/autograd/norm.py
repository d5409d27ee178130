"""A norm whose result is wanted in 8 bits alone: it leaves its kernel as operands of FP8 GEMMs.

    forward    rows, columns, mean, rstd = norm_float8(x)
    backward   dx, dweight, dbias = of the gradient of y, the norm's output, by the library's kernel

y itself is never written. In autograd's graph a tensor without values stands for it, so that the
linear which follows is what it always was: it gives the gradient of its input, and the norm takes
that of its output. Neither knows of the other's backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megasparse.fp8.scale import Scale
from megasparse.fp8.transformer_engine import norm_backward
from megasparse.kernels import norm_float8, rescale_
from megasparse.kernels.factors import Factors
from megasparse.kernels.norm_float8.reference import normalize
from megasparse.sparsity.gemms.protocol import Deferred


@dataclass(frozen=True, eq=False)
class Float8Input:
    """The input of a linear in FP8, quantized with the scale of the linear's input.

    It is no tuple: newer versions of megatron-core take a tuple from a norm for two outputs.

    Attributes:
        placeholder: (..., H), shape, dtype and place in the graph of the input; it has no values.
        rows: (T', H) e4m3, T' a multiple of 128.
        columns: (H, T') e4m3, what grad_weight needs, in its order; None where it is not computed,
            or made of the gathered rows.
        scale: of both.
        deferred: what the gradient of the input still lacks when it comes; gets it in the backward
            pass of the linear.
    """

    placeholder: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor | None
    scale: Scale
    deferred: Deferred


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        centred: bool,
        eps: float,
        scale: Scale,
        keep: bool,
        columns: bool,
        strided: bool,
        deferred: Deferred,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x_TH = x.reshape(-1, x.shape[-1])
        rows, x_HT, mean, rstd = norm_float8(
            x_TH,
            weight,
            bias,
            centred=centred,
            eps=eps,
            scale=scale.scale,
            transposed=columns,
            strided=strided,
            amax=scale.amax if keep else None,
        )
        ctx.eps, ctx.centred, ctx.deferred = eps, centred, deferred
        # The definition computes all again, so that its gradients are torch's.
        ctx.save_for_backward(x, weight, bias, *((mean, rstd) if x.is_cuda else (None, None)))
        ctx.mark_non_differentiable(rows, *(() if x_HT is None else (x_HT,)))
        ctx.set_materialize_grads(False)
        return x.new_empty(()).expand(x.shape), rows, x_HT

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        (dy, *_), (x, weight, bias, mean, rstd) = grads, ctx.saved_tensors
        assert dy is not None  # the others have no gradients
        dy_TH, x_TH = (t.reshape(-1, t.shape[-1]) for t in (dy, x))
        # Gradients of x go with dy times the weight, those of the parameters with dy alone: what is
        # multiplied here is one token long.
        lacks = ctx.deferred.factors
        if lacks is not None:
            weight = _given(weight.detach().clone(), lacks)
        if x.is_cuda:
            dx, *rest = norm_backward(dy_TH, x_TH, weight, mean, rstd)
        else:
            dx, *rest = _by_definition(dy_TH, x_TH, weight, bias, ctx.centred, ctx.eps)
        dweight, dbias, *_ = (*(_given(t, lacks) for t in rest), None)
        return dx.view(x.shape), dweight, dbias, *(None,) * 7


def _given(t: torch.Tensor, factors: Factors | None) -> torch.Tensor:
    """t, in place, times what the gradient lacks."""
    return t if factors is None else rescale_(t, *factors[:2], applied=factors[2])


def _by_definition(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    centred: bool,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, weight and (if there is one) bias, by torch."""
    given = [None if t is None else t.detach().requires_grad_() for t in (x_TH, weight, bias)]
    x, weight_leaf, bias_leaf = given
    assert x is not None and weight_leaf is not None
    with torch.enable_grad():
        y = normalize(x, weight_leaf, bias_leaf, eps, centred)
    return torch.autograd.grad(y, [t for t in given if t is not None], dy_TH)


def norm_to_float8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    centred: bool,
    eps: float,
    scale: Scale,
    trained: bool,
    gathered: bool = False,
    strided: bool = False,
) -> Float8Input:
    """LayerNorm or RMSNorm of x as the input of a linear in FP8, with gradients.

    Args:
        x: (..., H), 16 bits; H a multiple of 64.
        weight, bias: of the norm, (H,) of the same dtype; LayerNorm's bias may be missing, and
            RMSNorm's does.
        centred: LayerNorm; else RMSNorm.
        eps: added to the variance.
        scale: of the linear's input (`LinearGemms.input_scale`).
        trained: the linear's weight gets a gradient, if gradients are recorded now.
        gathered: the linear gathers its input over ranks, and makes the columns of that.
        strided: the linear wants its columns in the order of strided groups (`LinearGemms`).
    """
    keep = trained and torch.is_grad_enabled()  # inside the function it is off
    columns, deferred = keep and not gathered, Deferred()
    how = (centred, eps, scale, keep, columns, strided, deferred)
    placeholder, rows, x_HT = _Norm.apply(x, weight, bias, *how)
    return Float8Input(placeholder, rows, x_HT, scale, deferred)
