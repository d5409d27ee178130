"""The group of the configuration that says what is computed: the model."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config.layer_patterns import (
    PATTERN_FORM,
    WINDOW_FORM,
    layers_of,
    pattern_text,
    window_text,
)
from megasparse.config.schema.option import option


@dataclass
class ModelConfig:
    """Size and style of the Transformer."""

    model_type: str = option(
        "gpt",
        "a decoder that predicts the next token (gpt), or an encoder that predicts masked ones "
        "(bert)",
        choices=("gpt", "bert"),
    )
    bert_binary_head: bool = option(
        True, "bert: token types, and a head that tells whether two segments are in their order"
    )
    num_classes: int | None = option(
        None,
        "bert: fine-tune a head that puts texts into this many classes, in place of the others",
        at_least=2,
    )
    num_layers: int = option(4, "Transformer layers", at_least=1, below=10_001)
    hidden_size: int = option(256, "width of the residual stream", at_least=4)
    ffn_hidden_size: int | None = option(
        None,
        "width of the FFN; default 4 x hidden, with --swiglu or --geglu 8/3 x hidden in multiples "
        "of 64",
        at_least=4,
    )
    num_attention_heads: int = option(4, "attention heads", at_least=1)
    group_query_attention: bool = option(False, "grouped-query attention; needs --num-query-groups")
    num_query_groups: int | None = option(None, "key/value heads; default: all heads", at_least=1)
    kv_channels: int | None = option(None, "size of a head; default hidden / heads", at_least=1)
    seq_length: int = option(256, "tokens in a sequence", at_least=2)
    max_position_embeddings: int | None = option(
        None, "longest sequence that positions exist for; default seq-length", at_least=2
    )
    position_embedding_type: str = option(
        "learned_absolute", "positions", choices=("learned_absolute", "rope")
    )
    rotary_base: int = option(10000, "base of the rotary frequencies", at_least=1)
    rotary_percent: float = option(1.0, "share of a head that rotates", above=0.0)
    use_rope_scaling: bool = option(False, "rotary frequencies scaled as in Llama 3.1 to 3.3")
    rope_scaling_factor: float = option(8.0, "factor of use-rope-scaling", above=0.0)
    no_rope_freq: str | None = option(
        None,
        "layers without rotary positions: every N-th, or a list with 1 for those without",
        canonical=pattern_text,
        form=PATTERN_FORM,
    )
    window_size: str | None = option(
        None,
        "sliding-window attention: how many tokens before itself a token sees, as in 4095,0",
        canonical=window_text,
        form=WINDOW_FORM,
    )
    window_attn_skip_freq: str | None = option(
        None,
        "layers that see all tokens in spite of window-size: every N-th, or a list with 1 for "
        "those with the window; default: none",
        canonical=pattern_text,
        form=PATTERN_FORM,
    )
    normalization: str = option("LayerNorm", "norm layers", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "epsilon of the norm layers", above=0.0)
    norm_placement: str = option(
        "pre",
        "norms before attention and FFN (pre), on their results before the sum (post), or both",
        choices=("pre", "post", "both"),
    )
    qk_layernorm: bool = option(False, "norms of queries and keys")
    qk_layernorm_scope: str = option(
        "head",
        "what qk-layernorm takes as one vector: a head, or all heads together",
        choices=("head", "all"),
    )
    parallel_residual: bool = option(
        False, "attention and FFN both take the layer's input, and both are added to it"
    )
    swiglu: bool = option(False, "gated SiLU in the FFN instead of GELU")
    geglu: bool = option(False, "gated GELU (tanh form) in the FFN instead of GELU")
    squared_relu: bool = option(False, "squared ReLU in the FFN instead of GELU")
    relu: bool = option(False, "ReLU in the FFN instead of GELU")
    exact_gelu: bool = option(False, "GELU by the error function instead of its tanh form")
    disable_bias_linear: bool = option(False, "no biases in the linear layers")
    add_qkv_bias: bool = option(False, "biases in the QKV projection, whatever the others have")
    untie_embeddings_and_output_weights: bool = option(
        False, "separate weights for embedding and output layer"
    )
    vocab_size: int | None = option(
        None, "tokens of the vocabulary before padding; default: the tokenizer's", at_least=1
    )
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this and of the tensor parallel size", at_least=1
    )
    hidden_dropout: float = option(0.0, "dropout on the residual branches", at_least=0.0, below=1.0)
    attention_dropout: float = option(0.0, "dropout on attention weights", at_least=0.0, below=1.0)
    init_method_std: float = option(0.02, "standard deviation of the initial weights", above=0.0)
    num_experts: int | None = option(
        None, "experts of a layer, in place of one FFN; default: no experts", at_least=2
    )
    moe_layer_freq: str = option(
        "1",
        "layers with experts: the first of every N, or a list with 1 for those with experts",
        canonical=pattern_text,
        form=PATTERN_FORM,
    )
    moe_ffn_hidden_size: int | None = option(
        None, "width of an expert's FFN; default ffn-hidden-size", at_least=4
    )
    moe_router_topk: int = option(2, "experts that compute a token", at_least=1)
    moe_router_pre_softmax: bool = option(
        False,
        "the softmax over all experts before the choice, whose probabilities need not sum to 1; "
        "off: over the chosen ones",
    )
    moe_router_dtype: str | None = option(
        "fp32", "precision of the router's logits and probabilities", choices=("fp32", "fp64")
    )
    moe_router_load_balancing_type: str = option(
        "aux_loss",
        "what moe-aux-loss-coeff is the weight of: the balance of a micro-batch (aux_loss), of "
        "every sequence (seq_aux_loss), or nothing (none)",
        choices=("aux_loss", "seq_aux_loss", "none"),
    )
    moe_aux_loss_coeff: float = option(
        0.0, "weight of the loss that balances the experts (a good start: 0.01)", at_least=0.0
    )
    moe_z_loss_coeff: float | None = option(
        None, "weight of the loss that keeps the router's logits small; default 0", above=0.0
    )
    moe_shared_expert_intermediate_size: int | None = option(
        None,
        "width of an FFN that computes every token beside the experts; default: none",
        at_least=4,
    )
    moe_shared_expert_gate: bool = option(False, "a sigmoid gate on what the shared expert gives")

    @property
    def is_bert(self) -> bool:
        """Whether tokens see those behind them, and the loss is of masked ones."""
        return self.model_type == "bert"

    @property
    def block(self) -> str:
        """Name of the module that has the layers: megatron-core's."""
        return "encoder" if self.is_bert else "decoder"

    @property
    def token_types(self) -> int:
        """Kinds of segments that have an embedding; 0: there is none."""
        return 2 if self.is_bert and self.bert_binary_head else 0

    @property
    def gated(self) -> bool:
        """Whether the FFN's first linear gives `[gate | up]`."""
        return self.swiglu or self.geglu

    @property
    def window(self) -> int | None:
        """Tokens that a token of a layer with a window sees, itself included; None: all before."""
        return None if self.window_size is None else int(self.window_size.split(",")[0]) + 1

    @property
    def windowed_layers(self) -> list[bool]:
        """For each layer whether it has a sliding window."""
        if self.window_size is None:
            return [False] * self.num_layers
        return layers_of(self.window_attn_skip_freq, self.num_layers, nth=False)

    @property
    def expert_layers(self) -> list[bool]:
        """For each layer whether its FFN is a mixture of experts."""
        if self.num_experts is None:
            return [False] * self.num_layers
        if self.moe_layer_freq.isdecimal():
            every = int(self.moe_layer_freq)
            return [number % every == 0 for number in range(self.num_layers)]
        return layers_of(self.moe_layer_freq, self.num_layers, nth=True)

    @property
    def expert_width(self) -> int:
        """Of an expert's FFN."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size or 0

    @property
    def layers_without_rope(self) -> list[bool]:
        """For each layer whether it has no rotary positions."""
        if self.no_rope_freq is None:
            return [False] * self.num_layers
        return layers_of(self.no_rope_freq, self.num_layers, nth=True)
