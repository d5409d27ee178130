"""BERT: megatron-core's `BertModel` from the spec provider's layers, with sequence parallelism.

megatron-core builds its norms from Apex, or from torch's without sequence parallelism. So what it
builds is built here, from the provider's classes; what it computes is its own `forward`.

With classes to tell apart (`--num-classes`) a pooler and one linear layer take the place of the
heads of pre-training.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.bert.bert_lm_head import BertLMHead
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.bert.pooler import Pooler
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import get_linear_layer

from megasparse.config import ResolvedModel


class MaskedTokenHead(BertLMHead):
    """`norm(gelu(dense(h)))`, which the word embeddings turn into logits.

    Args:
        config: of the layers.
        layer_norm: builds the norm (`SparseSpecProvider.layer_norm`).
    """

    def __init__(self, config: TransformerConfig, layer_norm: Any) -> None:
        MegatronModule.__init__(self, config=config)
        self.dense = _linear(config.hidden_size, config.hidden_size, config)
        for parameter in self.dense.parameters():  # of a slice of the sequence alone
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm = layer_norm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.gelu = torch.nn.functional.gelu


class Bert(BertModel):
    """An encoder with heads for masked tokens and for the order of two segments.

    Args:
        config: of the layers.
        block: layers and final norm, with attention to all tokens (`get_block_spec`).
        layer_norm: builds the norm of the head.
        model: sizes and heads.
        vocab_size: padded.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        layer_norm: Any,
        model: ResolvedModel,
        vocab_size: int,
    ) -> None:
        super(BertModel, self).__init__(config=config)  # what it has of a language model
        self.pre_process, self.return_embeddings = True, False
        self.post_process = model.num_classes is None
        self.vocab_size, self.max_sequence_length = vocab_size, model.max_position_embeddings
        self.parallel_output = True
        self.share_embeddings_and_output_weights = not model.untie_embeddings_and_output_weights
        self.position_embedding_type = model.position_embedding_type
        self.add_binary_head = model.bert_binary_head
        # Who may be seen, `(B, 1, 1, S)`: of a padding token nobody asks what it sees.
        self.attn_mask_dimensions = "b11s"
        self.embedding = LanguageModelEmbedding(
            config=config,
            vocab_size=vocab_size,
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type="learned_absolute",
            num_tokentypes=model.token_types,
        )
        self.encoder = TransformerBlock(config=config, spec=block)
        if self.post_process:
            self._build_heads(config, layer_norm)
            self.setup_embeddings_and_output_layer()

    def _build_heads(self, config: TransformerConfig, layer_norm: Any) -> None:
        self.lm_head = MaskedTokenHead(config, layer_norm)
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            self.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=True,
            gather_output=False,
            skip_weight_param_allocation=self.share_embeddings_and_output_weights,
        )
        self.binary_head = None
        if self.add_binary_head:
            self.binary_head = _linear(config.hidden_size, 2, config)
            self.pooler = _pooler(config)


class BertClassifier(Bert):
    """The encoder with a head for classes: a linear layer on the first token's pooled state.

    Args: those of `Bert`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        layer_norm: Any,
        model: ResolvedModel,
        vocab_size: int,
    ) -> None:
        super().__init__(config, block, layer_norm, model, vocab_size)
        assert model.num_classes is not None
        self.pooler = _pooler(config)
        self.dropout = torch.nn.Dropout(config.hidden_dropout)
        self.classification_head = _linear(config.hidden_size, model.num_classes, config)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        tokentype_ids: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """`(B, classes)` logits of `(B, S)` tokens.

        Args:
            attention_mask: `(B, S)`, 0 for padding.
            tokentype_ids: `(B, S)` int64, in a model that has embeddings for them.
        """
        hidden_SBH = super().forward(input_ids, attention_mask, tokentype_ids)
        logits: torch.Tensor = self.classification_head(self.dropout(self.pooler(hidden_SBH, 0)))
        return logits


def _linear(inputs: int, outputs: int, config: TransformerConfig) -> torch.nn.Linear:
    return get_linear_layer(inputs, outputs, config.init_method, config.perform_initialization)


def _pooler(config: TransformerConfig) -> Pooler:
    """`tanh(dense(h))` of a token, the same on all tensor-parallel ranks."""
    return Pooler(config.hidden_size, config.init_method, config, config.sequence_parallel)
