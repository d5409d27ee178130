"""Every parameter of a model, in one table: name, whole shape, how it is cut, where it lives.

Names and shapes are those that the built model has (megatron-core's names, with the norms apart).
Everything that needs a shape asks here: exports, checkpoints, estimates of memory and operations,
the count of parameters. No torch.

    place       what is there                                   pipeline stage
    embedding   word embeddings (V, H), learned positions       the first; tied: also the last
    layer       norms (H,), four linears (N, K) or, with E      that of the layer
                experts, a router (E, H) and linears (E N, K)
    output      final norm (H,), untied output layer (V, H)     the last
                BERT: its heads too, (H, H), (2, H) or (C, H)

V: vocabulary, H: hidden size, N: outputs, K: inputs.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from megasparse.config.resolved import ResolvedConfig, ResolvedModel
from megasparse.config.validate import pipeline_split

Place = Literal["embedding", "layer", "output"]

WORD_EMBEDDINGS = "embedding.word_embeddings"
ROUTER = "mlp.router.weight"
# Matrices that choose and weigh experts, and are no linears to be pruned.
_GATES = (ROUTER, "mlp.shared_experts.gate_weight")
# Modules that have a row for every token; the rows are padded.
OUTPUT_LAYER = "output_layer"
_VOCABULARY = (WORD_EMBEDDINGS, OUTPUT_LAYER)
VOCABULARY = tuple(f"{module}.weight" for module in _VOCABULARY)


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of the whole model.

    Attributes:
        name: in the whole model, e.g. `decoder.layers.0.mlp.linear_fc1.weight`.
        shape: of the whole, `(N, K)` or `(N,)`.
        shard_dim: dimension that tensor parallelism cuts; None: every rank has the whole.
        parts: matrices that are fused along it, each of which is cut (2 for gate and up).
        place: the kind of pipeline stage that it belongs to.
        layer: number of its Transformer layer in the whole model, from 0.
        experts: whose weights are stacked along dimension 0, one after the other; 1: it is no
            expert's. Of `parts` each expert has its share.
    """

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None = None
    parts: int = 1
    place: Place = "layer"
    layer: int | None = None
    experts: int = 1

    @property
    def module(self) -> str:
        """Name of the module that has it."""
        return self.name.rpartition(".")[0]

    @property
    def is_linear(self) -> bool:
        """The weight `(N, K)` of a layer's linear: what a recipe can make sparse."""
        return self.place == "layer" and len(self.shape) == 2 and not self.name.endswith(_GATES)

    @property
    def numel(self) -> int:
        """Entries of the whole."""
        return math.prod(self.shape)

    def local_shape(self, tp: int, ep: int = 1) -> tuple[int, ...]:
        """Shape on one of `tp` tensor-parallel ranks, with experts over `ep` ranks."""
        cut = [size // tp if dim == self.shard_dim else size for dim, size in enumerate(self.shape)]
        if self.experts > 1:
            cut[0] //= ep
        return tuple(cut)

    def local_numel(self, tp: int, ep: int = 1) -> int:
        """Entries of `local_shape`."""
        return math.prod(self.local_shape(tp, ep))


def layer_parameters(model: ResolvedModel, layer: int = 0) -> list[ParameterShape]:
    """The parameters of one Transformer layer, by their names within it, in the model's order.

    Args:
        layer: its number; some layers may have experts, and others none.
    """
    hidden = model.hidden_size
    heads = model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups * model.kv_channels
    bias = not model.disable_bias_linear
    qkv_bias = bias or model.add_qkv_bias
    before, after = model.norm_placement != "post", model.norm_placement != "pre"
    return [
        *(_norm("input_layernorm", model) if before else ()),
        *_linear("self_attention.linear_proj", (hidden, heads), 1, bias),
        # By query group: its queries, its key, its value. A rank has whole groups.
        *_linear("self_attention.linear_qkv", (heads + 2 * groups, hidden), 0, qkv_bias),
        *_qk_norms(model, heads, groups),
        *(_norm("pre_mlp_layernorm", model) if before else ()),
        *(_experts(model) if model.expert_layers[layer] else _mlp("mlp", model, bias)),
        *(_norm("post_self_attn_layernorm", model) if after else ()),
        *(_norm("post_mlp_layernorm", model) if after else ()),
    ]


def parameters(model: ResolvedModel, vocabulary: int) -> list[ParameterShape]:
    """All parameters of the whole model, in its order.

    Args:
        vocabulary: tokens, with padding or without it.
    """
    tokens = (vocabulary, model.hidden_size)
    found = [ParameterShape(f"{WORD_EMBEDDINGS}.weight", tokens, 0, place="embedding")]
    if model.position_embedding_type == "learned_absolute":
        positions = (model.max_position_embeddings, model.hidden_size)
        name = "embedding.position_embeddings.weight"
        found.append(ParameterShape(name, positions, place="embedding"))
    if model.token_types:
        types = (model.token_types, model.hidden_size)
        name = "embedding.tokentype_embeddings.weight"
        found.append(ParameterShape(name, types, place="embedding"))
    for number in range(model.num_layers):
        found += [
            dataclasses.replace(one, name=f"{model.block}.layers.{number}.{one.name}", layer=number)
            for one in layer_parameters(model, number)
        ]
    found += _norm(f"{model.block}.final_layernorm", model, "output")
    if model.is_bert:
        return found + _bert_heads(model, tokens)
    if model.untie_embeddings_and_output_weights:
        found.append(ParameterShape("output_layer.weight", tokens, 0, place="output"))
    return found


def stage_parameters(config: ResolvedConfig, vocabulary: int, stage: int) -> list[ParameterShape]:
    """The parameters of a pipeline stage; tied word embeddings are on the first and the last.

    Args:
        vocabulary: padded.
    """
    model, split = config.model, pipeline_split(config)
    first, last = stage == 0, stage == len(split) - 1
    layers = range(sum(split[:stage]), sum(split[: stage + 1]))
    tied = not model.untie_embeddings_and_output_weights

    def is_here(one: ParameterShape) -> bool:
        if one.place == "layer":
            return one.layer in layers
        if one.place == "output":
            return last
        return first or (last and tied and one.module == WORD_EMBEDDINGS)

    return [one for one in parameters(model, vocabulary) if is_here(one)]


def active_share(one: ParameterShape, model: ResolvedModel) -> float:
    """The share of a parameter's entries that compute a token: of experts, the chosen ones'."""
    return 1.0 if one.experts == 1 else model.moe_router_topk / one.experts


def parameter_count(model: ResolvedModel, vocabulary: int) -> int:
    """Parameters of the whole model, each once (embedding and output layer included).

    Args:
        vocabulary: padded.
    """
    return sum(one.numel for one in parameters(model, vocabulary))


def _bert_heads(model: ResolvedModel, tokens: tuple[int, int]) -> list[ParameterShape]:
    """Of masked tokens and of the segments' order, or of classes; whole on every rank but for what
    has a row for every token."""
    hidden = model.hidden_size

    def head(module: str, outputs: int) -> list[ParameterShape]:
        return [
            ParameterShape(f"{module}.weight", (outputs, hidden), place="output"),
            ParameterShape(f"{module}.bias", (outputs,), place="output"),
        ]

    if model.num_classes is not None:
        return [*head("pooler.dense", hidden), *head("classification_head", model.num_classes)]
    found = [*head("lm_head.dense", hidden), *_norm("lm_head.layer_norm", model, "output")]
    if model.untie_embeddings_and_output_weights:
        found.append(ParameterShape("output_layer.weight", tokens, 0, place="output"))
    found.append(ParameterShape("output_layer.bias", tokens[:1], 0, place="output"))
    if model.bert_binary_head:
        found += [*head("binary_head", 2), *head("pooler.dense", hidden)]
    return found


def active_parameter_count(model: ResolvedModel, vocabulary: int) -> int:
    """`parameter_count` of what computes one token: of a layer's experts the chosen ones alone."""
    return sum(round(one.numel * active_share(one, model)) for one in parameters(model, vocabulary))


def _mlp(
    module: str, model: ResolvedModel, bias: bool, width: int | None = None, experts: int = 1
) -> list[ParameterShape]:
    """Both linears of an FFN, or those of all experts stacked."""
    hidden, gated = model.hidden_size, 2 if model.gated else 1
    ffn = width or model.ffn_hidden_size
    found = [
        *_linear(f"{module}.linear_fc1", (experts * gated * ffn, hidden), 0, bias, experts * gated),
        *_linear(f"{module}.linear_fc2", (experts * hidden, ffn), 1, bias),
    ]
    return [dataclasses.replace(one, experts=experts) for one in found]


def _experts(model: ResolvedModel) -> list[ParameterShape]:
    """The router, the experts, and the FFN that computes every token beside them."""
    assert model.num_experts is not None
    hidden, shared = model.hidden_size, model.moe_shared_expert_intermediate_size
    found = [ParameterShape(ROUTER, (model.num_experts, hidden))]
    found += _mlp("mlp.experts", model, False, model.expert_width, model.num_experts)
    if shared is not None:
        if model.moe_shared_expert_gate:
            found.append(ParameterShape("mlp.shared_experts.gate_weight", (1, hidden)))
        found += _mlp("mlp.shared_experts", model, False, shared)
    return found


def _norm(
    module: str, model: ResolvedModel, place: Place = "layer", width: int | None = None
) -> list[ParameterShape]:
    kinds = ("weight",) if model.normalization == "RMSNorm" else ("weight", "bias")
    shape = (width or model.hidden_size,)
    return [ParameterShape(f"{module}.{kind}", shape, place=place) for kind in kinds]


def _qk_norms(model: ResolvedModel, heads: int, groups: int) -> list[ParameterShape]:
    """Of queries and keys: every head has the same weights, or all heads together have their own,
    of which a rank has its heads'."""
    if not model.qk_layernorm:
        return []
    names = ("self_attention.q_layernorm", "self_attention.k_layernorm")
    if model.qk_layernorm_scope == "head":
        return [one for name in names for one in _norm(name, model, width=model.kv_channels)]
    return [
        ParameterShape(f"{name}.weight", (width,), 0)
        for name, width in zip(names, (heads, groups), strict=True)
    ]


def _linear(
    module: str, shape: tuple[int, int], shard_dim: int, bias: bool, parts: int = 1
) -> list[ParameterShape]:
    found = [ParameterShape(f"{module}.weight", shape, shard_dim, parts)]
    if bias:
        # Of a linear that is cut along its inputs every rank has the whole bias.
        cut = (0, parts) if shard_dim == 0 else (None, 1)
        found.append(ParameterShape(f"{module}.bias", shape[:1], *cut))
    return found
