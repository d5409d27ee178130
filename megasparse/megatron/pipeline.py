"""The model cut into the parts of a pipeline: embedding, layers, final norm, output layer.

Parts are megatron-core's modules, the same that `GPTModel` is made of, each with one input and one
output, so that any run of consecutive parts can be a stage. A stage's parameters keep the names
that they have in the whole model (`decoder.layers.N` with the global N): initial weights, sparsity
and checkpoints do not know of the pipeline.

Between parts travels the hidden state `(S, B, H)` (`(S/tp, B, H)` with sequence parallelism, S this
rank's tokens with context parallelism), with
the attention mask as uint8 behind it where documents must not see each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megasparse.config import ResolvedConfig, pipeline_split
from megasparse.megatron.graphs.captured import is_replayed
from megasparse.megatron.grid import Grid
from megasparse.megatron.loss import masked_mean, token_cross_entropy
from megasparse.megatron.model import (
    finish_model,
    layer_style,
    spec_provider,
    transformer_config,
)
from megasparse.megatron.spec import SparseSpecProvider, get_layer_spec
from megasparse.sparsity.clock import Clock

Hidden = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class PartSpec:
    """How a part is built, on the stage that it falls to.

    Attributes:
        kind, options: class and keyword arguments.
        tied: parts with the same key share their module's weight `tied_weight`.
        forward: what to call with (module, input) instead of the module.
    """

    kind: type[torch.nn.Module]
    options: dict[str, Any]
    tied: str | None = None
    tied_weight: str = ""
    forward: Callable[[Any, Any], Any] | None = None


def part_specs(
    config: ResolvedConfig, grid: Grid, padded_vocab_size: int, clock: Clock
) -> list[PartSpec]:
    """All parts of the model, in order: embedding, layers, final norm, output layer.

    Args:
        config: of the run.
        clock: the run's; a recomputed layer draws the numbers of the micro-batch it belongs to.
    """
    model = config.model
    layers = transformer_config(config, grid.device)
    sizes = {"config": layers, "vocab_size": padded_vocab_size}
    embedding = {
        **sizes,
        "max_sequence_length": model.max_position_embeddings,
        "position_embedding_type": model.position_embedding_type,
    }
    rotary = None
    if model.position_embedding_type == "rope":
        rotary = RotaryEmbedding(
            kv_channels=model.kv_channels,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            rope_scaling=model.use_rope_scaling,
            rope_scaling_factor=model.rope_scaling_factor,
            use_cpu_initialization=grid.device.type == "cpu",
        )
    provider = spec_provider(config, grid.device)
    style = layer_style(model)
    specs = {experts: get_layer_spec(provider, style, experts) for experts in (False, True)}
    recomputed = recomputed_layers(config)
    body = [
        PartSpec(
            LayerPart,
            {
                "config": layers,
                "spec": specs[model.expert_layers[number]],
                "number": number,
                "rotary": rotary,
                "clock": clock,
                "recompute": number in recomputed,
            },
        )
        for number in range(model.num_layers)
    ]
    norm = PartSpec(NormPart, {"config": layers, "provider": provider})
    if model.untie_embeddings_and_output_weights:
        first, last = PartSpec(EmbeddingPart, embedding), PartSpec(OutputPart, sizes)
    else:
        tie: dict[str, Any] = {
            "tied": "embedding",
            "tied_weight": "embedding.word_embeddings.weight",
        }
        first = PartSpec(EmbeddingPart, embedding, **tie)
        # The copy on the last stage has no use for positions.
        copy = {**embedding, "position_embedding_type": "none"}
        last = PartSpec(EmbeddingPart, copy, **tie, forward=EmbeddingPart.logits)
    return [first, *body, norm, last]


def stage_bounds(config: ResolvedConfig) -> list[int]:
    """First part of each stage, and the number of parts: the embedding goes with the first layer,
    norm and output with the last."""
    bounds = [0]
    for count in pipeline_split(config):
        bounds.append(bounds[-1] + count)
    return [0, *(bound + 1 for bound in bounds[1:-1]), bounds[-1] + 3]


class EmbeddingPart(torch.nn.Module):
    """Word and position embeddings; with tied weights also the output layer."""

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        position_embedding_type: str,
    ) -> None:
        super().__init__()
        self.embedding = LanguageModelEmbedding(
            config=config,
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            position_embedding_type=position_embedding_type,
        )
        self._output = _output_layer(config, vocab_size, own_weight=False)

    def forward(self, inputs: Sequence[torch.Tensor]) -> Hidden:
        """(tokens, position_ids) `(B, S)` int64 and optionally a mask -> what the layers take."""
        tokens, position_ids, *mask = inputs
        hidden = self.embedding(input_ids=tokens, position_ids=position_ids)
        return (hidden, mask[0].view(torch.uint8)) if mask else hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(S, B, V / tp)` logits with the word embeddings as output weights."""
        return self._output(hidden, weight=self.embedding.word_embeddings.weight)[0]

    def canonical(self) -> dict[str, torch.nn.Module]:
        return {"embedding": self.embedding}


class LayerPart(torch.nn.Module):
    """One Transformer layer.

    Args:
        number: of the layer in the whole model, from 0.
        rotary: shared by all layers; None without rotary positions.
        recompute: keep the layer's input alone and compute the layer again in the backward pass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: ModuleSpec,
        number: int,
        rotary: RotaryEmbedding | None,
        clock: Clock,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.layer = build_module(spec, config=config, layer_number=number + 1)
        self._config, self._number, self._clock = config, number, clock
        self.recompute = recompute
        # In a tuple, so that the shared module is not registered once a layer.
        self._rotary = (rotary,)

    def forward(self, inputs: Hidden) -> Hidden:
        """hidden or (hidden, mask) -> the same."""
        hidden, mask = inputs if isinstance(inputs, tuple) else (inputs, None)
        if self.recompute and self.training and not is_replayed(self.layer):
            hidden = self._checkpointed(hidden, mask)
        else:
            hidden = self._compute(hidden, mask)
        return hidden if mask is None else (hidden, mask)

    def _compute(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        config, rotary = self._config, self._rotary[0]
        angles = None
        if rotary is not None:
            split = config.tensor_model_parallel_size if config.sequence_parallel else 1
            angles = rotary(hidden.shape[0] * split * config.context_parallel_size)
        # With sequence parallelism residuals differ by rank, and so does their dropout (as in
        # Megatron's TransformerBlock).
        draws = (
            tensor_parallel.get_cuda_rng_tracker().fork()
            if config.sequence_parallel
            else contextlib.nullcontext()
        )
        with draws:
            output, _ = self.layer(
                hidden_states=hidden,
                attention_mask=None if mask is None else mask.view(torch.bool),
                rotary_pos_emb=angles,
            )
        return output

    def _checkpointed(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The layer computed twice. Other micro-batches pass forward between the two, so the
        second time the clock must be put back for the MVUE seeds to be the first's."""
        micro_batch, slot = self._clock.micro_batch, self._clock.slot

        def run(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            with self._clock.at(micro_batch, slot):
                return self._compute(hidden, mask)

        return tensor_parallel.checkpoint(run, False, hidden, mask)

    def canonical(self) -> dict[str, torch.nn.Module]:
        return {f"decoder.layers.{self._number}": self.layer}


class NormPart(torch.nn.Module):
    """The final norm; the attention mask ends here."""

    def __init__(self, config: TransformerConfig, provider: SparseSpecProvider) -> None:
        super().__init__()
        kind = provider.layer_norm()
        self.norm = kind(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, inputs: Hidden) -> torch.Tensor:
        return self.norm(inputs[0] if isinstance(inputs, tuple) else inputs)

    def canonical(self) -> dict[str, torch.nn.Module]:
        return {"decoder.final_layernorm": self.norm}


class OutputPart(torch.nn.Module):
    """The output layer with weights of its own."""

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.output_layer = _output_layer(config, vocab_size, own_weight=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """-> `(S, B, V / tp)` logits."""
        return self.output_layer(hidden)[0]

    def canonical(self) -> dict[str, torch.nn.Module]:
        return {"output_layer": self.output_layer}


def whole_model_view(parts: Sequence[Any]) -> torch.nn.Module:
    """The parts of a stage as one module with the parameter names of the whole model."""
    view = torch.nn.Module()
    for part in parts:
        for path, module in part.canonical().items():
            *parents, name = path.split(".")
            node = view
            for parent in parents:
                if parent not in node._modules:
                    node.add_module(parent, torch.nn.Module())
                node = node._modules[parent]  # type: ignore[assignment]
            node.add_module(name, module)
    return view


def finish_stage(parts: Sequence[Any], config: ResolvedConfig, grid: Grid) -> torch.nn.Module:
    """Cast, mark and initialise the parts of a stage; their `whole_model_view`."""
    view = whole_model_view(parts)
    finish_model(view, config, grid)
    return view


def vocab_parallel_loss(logits: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
    """0-d float32: mean cross entropy over the tokens with loss_mask 1.

    Args:
        logits: `(S, B, V / tp)`.
        labels: (labels `(B, S)` int64, loss_mask `(B, S)` float32[, divisor 0-d, see
            `masked_mean`]).
    """
    targets, mask, *divisor = labels
    losses = token_cross_entropy(logits, targets.transpose(0, 1).contiguous())
    losses = losses.transpose(0, 1).contiguous()
    return masked_mean(losses, mask, *divisor)


def gather_logits(logits: torch.Tensor) -> torch.Tensor:
    """`(S, B, V / tp)` of every tensor-parallel rank -> `(B, S, V)`."""
    whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    return whole.transpose(0, 1).contiguous()


def _output_layer(
    config: TransformerConfig, vocab_size: int, own_weight: bool
) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_bias_add=False,
        gather_output=False,
        skip_weight_param_allocation=not own_weight,
    )


def recomputed_layers(config: ResolvedConfig) -> set[int]:
    """Numbers of the layers of the whole model that are recomputed whole."""
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        return set()
    if parallel.recompute_method == "uniform":
        return set(range(config.model.num_layers))
    chosen, first = set(), 0
    for count in pipeline_split(config):
        chosen |= set(range(first, first + parallel.recompute_chunk))
        first += count
    return chosen
