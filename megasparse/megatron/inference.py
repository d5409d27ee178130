"""Decoding with megatron-core's cache of keys and values."""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel

from megasparse.errors import ConfigError


class CachedDecoder:
    """A model that is fed its context once, then one token after the other.

    Args:
        model: whole (no pipeline), with any tensor-parallel size; every rank of the group calls.
        max_length: tokens of context and continuation together.
        batch_size: sequences side by side, of equal length.
    """

    def __init__(self, model: GPTModel, max_length: int, batch_size: int = 1) -> None:
        self._model = model.eval()
        self._context = StaticInferenceContext(batch_size, max_length)
        self._max_length = max_length

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self._context.sequence_len_offset

    @torch.no_grad()
    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `(B, V)` after the last of `tokens` `(B, S)` int64, on every rank.

        Raises:
            ConfigError: more tokens than `max_length`, or more than one at a time after the first
                call.
        """
        length = tokens.shape[1]
        if self.length + length > self._max_length:
            raise ConfigError(
                f"{self.length + length} tokens, expected at most {self._max_length} in this cache"
            )
        if self.length and length != 1:
            raise ConfigError(f"{length} tokens after the context, expected one at a time")
        positions = torch.arange(self.length, self.length + length, device=tokens.device)
        logits = self._model(
            tokens,
            positions.expand_as(tokens),
            None,
            inference_context=self._context,
            runtime_gather_output=True,
        )
        self._context.sequence_len_offset += length
        return logits[:, -1]
