"""The spec provider: which classes a Megatron Transformer layer is built from.

It can be taken alone: `get_layer_spec(SparseSpecProvider())` gives the layers of any decoder that
megatron-core can build, with linears that `sparsify` turns 2:4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.extensions import transformer_engine
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megasparse.megatron.blocks.attention import RotaryQkvAttention
from megasparse.megatron.blocks.experts import expert_layer_spec
from megasparse.megatron.blocks.qk_norm import AllHeadsRMSNorm
from megasparse.megatron.blocks.residual import ResidualLayer
from megasparse.megatron.blocks.torch_modules import GatedActivation, SdpaAttention, TorchNorm
from megasparse.megatron.parallel_linear import SparseColumnParallelLinear, SparseRowParallelLinear


@dataclass(frozen=True)
class SparseSpecProvider:
    """megatron-core's `BackendSpecProvider` with megasparse's linears.

    Attributes:
        transformer_engine: norms and attention are Transformer Engine's (GPUs alone), which know
            no masks but the causal one and, of encoders, padding; else torch's.
    """

    transformer_engine: bool = False

    def column_parallel_linear(self) -> type:
        return SparseColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return SparseRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        return None

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        return transformer_engine.TENorm if self.transformer_engine else TorchNorm

    def core_attention(self) -> type:
        if self.transformer_engine:
            return transformer_engine.TEDotProductAttention
        return SdpaAttention

    def grouped_mlp_modules(self, *_: Any) -> Any:
        """Refused: experts are built by `get_layer_spec(..., experts=True)`."""
        raise ValueError(
            "megatron-core's expert classes are not SparseSpecProvider's; use get_layer_spec with "
            "experts=True"
        )

    def activation_func(self) -> type | None:
        """Used where the layers' config has `use_te_activation_func`: SwiGLU and GEGLU."""
        return GatedActivation


def transformer_engine_is_there() -> bool:
    """Whether megatron-core has found Transformer Engine, which runs on GPUs alone."""
    return bool(transformer_engine.HAVE_TE)


@dataclass(frozen=True)
class LayerStyle:
    """Where a layer's norms are; as the configuration has them by default.

    Attributes:
        placement: of the norms: "pre", "post" or "both" (`residual.py`).
        parallel: attention and FFN take the same input.
        qk_norm: norms of queries and keys, "head" by "head" or of "all" together.
        heads, groups: of all ranks; for "all".
        causal: a token sees those before it; else all but padding (BERT).
    """

    placement: str = "pre"
    parallel: bool = False
    qk_norm: str | None = None
    heads: int = 0
    groups: int = 0
    causal: bool = True


def get_layer_spec(
    provider: SparseSpecProvider, style: LayerStyle = LayerStyle(), experts: bool = False
) -> ModuleSpec:
    """A layer from the provider's classes: of a causal decoder, or of an encoder.

    Args:
        experts: its FFN is a mixture of experts.
    """
    norm = provider.layer_norm()
    before = IdentityOp if style.placement == "post" else norm
    special: dict[str, Any] = {}
    if style.placement != "pre" or style.parallel:
        behind = None if style.placement == "pre" else norm
        special = {"norm_behind": behind, "parallel": style.parallel}
    q_norm, k_norm = _qk_norms(provider, style)
    mask = AttnMaskType.causal if style.causal else AttnMaskType.padding
    return ModuleSpec(
        module=ResidualLayer if special else TransformerLayer,
        params=special,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=ModuleSpec(
                module=RotaryQkvAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=provider.column_parallel_linear(),
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=q_norm,
                    k_layernorm=k_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=expert_layer_spec(provider)
            if experts
            else get_mlp_module_spec_for_backend(backend=provider, use_te_activation_func=True),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _qk_norms(provider: SparseSpecProvider, style: LayerStyle) -> tuple[Any, Any]:
    """What norms of queries and of keys are built from."""
    if style.qk_norm is None:
        return IdentityOp, IdentityOp
    if style.qk_norm == "head":
        return (provider.layer_norm(for_qk=True),) * 2
    return (
        ModuleSpec(AllHeadsRMSNorm, params={"heads": style.heads}),
        ModuleSpec(AllHeadsRMSNorm, params={"heads": style.groups}),
    )


def get_block_spec(
    provider: SparseSpecProvider,
    num_layers: int,
    style: LayerStyle = LayerStyle(),
    expert_layers: Sequence[bool] | None = None,
) -> TransformerBlockSubmodules:
    """What megatron-core's `GPTModel` takes as `transformer_layer_spec`.

    Args:
        provider: says which classes a layer is built from.
        num_layers: of the whole block, as `TransformerConfig.num_layers`.
        style: where the layers' norms are.
        expert_layers: for each layer whether its FFN is a mixture of experts; None: none is.

    Returns:
        The layers and the final norm. Which norm that is (LayerNorm, RMSNorm), and with which
        epsilon, the `TransformerConfig` says when the model is built.
    """
    kinds = {experts: get_layer_spec(provider, style, experts) for experts in (False, True)}
    layers = [kinds[experts] for experts in expert_layers or [False] * num_layers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=provider.layer_norm())
