"""Norms before linears in FP8: their output leaves them as operands of the linears' GEMMs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.transformer_layer import TransformerLayer

from megasparse.kernels import norm_amax
from megasparse.megatron.parallel_linear import SparseColumnParallelLinear
from megasparse.sparsity.autograd.norm import Float8Input, norm_to_float8
from megasparse.sparsity.gemms.dense_fp8 import ALIGNMENT
from megasparse.sparsity.gemms.protocol import LinearGemms

# What a layer may do with a norm's output beside giving it to the block behind it.
_OTHER_USES = (
    "recompute_input_layernorm",
    "recompute_pre_mlp_layernorm",
    "recompute_mlp",
    "offload_attn_norm",
    "offload_mlp_norm",
)


class NormToFloat8(torch.nn.Module):
    """A norm that quantizes its output for the linear behind it, as that would.

    It stands before the norm's own class in the method resolution order: parameters, their names,
    and all else are the norm's. What it gives is no tensor, so it falls back to the norm where
    anyone may look at it by a hook.
    """

    weight: torch.Tensor
    eps: float

    def begin(self, linear: SparseColumnParallelLinear, block: torch.nn.Module) -> None:
        """Quantize for `linear`, which alone sees what `block` (attention or MLP) is given."""
        self._readers = (linear, block)  # in a tuple, so that they become no submodules
        self._centred = isinstance(self, _kinds()[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor | Float8Input:
        """`(..., H)` to the same, or to the linear's input."""
        gemms, bias = self._gemms(x), getattr(self, "bias", None)
        how: dict[str, Any] = {"centred": self._centred, "eps": self.eps}

        def largest() -> torch.Tensor:
            return norm_amax(x.reshape(-1, x.shape[-1]), self.weight, bias, **how)

        scale = None if gemms is None else gemms.input_scale(largest)
        if gemms is None or scale is None:
            return super().forward(x)
        linear, _ = self._readers
        return norm_to_float8(
            x,
            self.weight,
            bias,
            **how,
            scale=scale,
            trained=linear.weight.requires_grad,
            gathered=linear.comm.gathers,
            strided=gemms.strided,
        )

    def _gemms(self, x: torch.Tensor) -> LinearGemms | None:
        """Of the linear, if it can take x in 8 bits."""
        watched = any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in (self, *self._readers)
        )
        same = x.dtype == self.weight.dtype and x.dtype.itemsize == 2
        if watched or not same:
            return None
        tokens = x.numel() // x.shape[-1]
        if self._readers[0].comm.gathers and tokens % ALIGNMENT:
            return None  # tiles would be padded on every rank
        gemms, _ = self._readers[0].current_gemms()
        return gemms


def fuse_norms(model: torch.nn.Module) -> int:
    """Make `NormToFloat8`s of the norms that can be; their number.

    Their class changes and nothing else, as that of MLPs does (`mlp.py`).
    """
    fused = 0
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        if any(getattr(layer, use, False) for use in _OTHER_USES):
            continue
        for norm, block, linear in (
            (layer.input_layernorm, layer.self_attention, "linear_qkv"),
            (layer.pre_mlp_layernorm, layer.mlp, "linear_fc1"),
        ):
            reader = getattr(block, linear, None)
            if isinstance(reader, SparseColumnParallelLinear) and _fits(norm, reader):
                norm.__class__ = _to_float8(norm.__class__)
                norm.begin(reader, block)
                fused += 1
    return fused


def _fits(norm: Any, linear: SparseColumnParallelLinear) -> bool:
    """Whether the norm's output may leave it in 8 bits."""
    rms, layer = _kinds()
    kinds: tuple[type[torch.nn.Module], ...] = (*rms, *layer)
    return (
        isinstance(norm, kinds)
        and not isinstance(norm, NormToFloat8)
        and not getattr(norm, "zero_centered_gamma", False)
        and isinstance(norm.weight, torch.Tensor)
        and linear.in_fp8_alone
        and (not linear.comm.gathers or _scale_comes_first(linear))
    )


def _scale_comes_first(linear: SparseColumnParallelLinear) -> bool:
    """A current scale follows from all that is gathered."""
    assert linear.quantizers is not None
    return linear.quantizers.x.scale_comes_first


def _kinds() -> tuple[tuple[type[torch.nn.Module], ...], tuple[type[torch.nn.Module], ...]]:
    """Classes of RMSNorm and of LayerNorm."""
    rms, layer = (torch.nn.RMSNorm,), (torch.nn.LayerNorm,)
    if transformer_engine.HAVE_TE:
        te = transformer_engine.te.pytorch
        return (*rms, te.RMSNorm), (*layer, te.LayerNorm)
    return rms, layer


@functools.cache
def _to_float8(kind: type) -> type:
    return type(f"{kind.__name__}ToFloat8", (NormToFloat8, kind), {})
