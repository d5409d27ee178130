"""Continue a prompt with the model of a run, in any layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megasparse.data.tokenizer import Tokenizer


@torch.no_grad()
def sample_text(
    logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    max_length: int,
    seed: int,
    device: torch.device,
    temperature: float = 0.8,
    pad_to: int = 64,
) -> str:
    """`prompt` and up to `num_tokens` sampled tokens; every rank of the grid takes part.

    Args:
        logits_of: `(B, S, V)` of tokens and positions `(B, S)`; `Engine.logits`.
        max_length: context of the model in tokens.
        seed: equal on all ranks, so that all sample the same tokens.
        temperature: divides the logits; 0 takes the most likely token.
        pad_to: lengths are padded to a multiple (sequence parallelism needs divisible ones);
            causal attention leaves the padding without effect.
    """
    generator = torch.Generator(device).manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    for _ in range(num_tokens):
        context = ids[-max_length:]
        length = min(-(-len(context) // pad_to) * pad_to, max_length)
        tokens = torch.zeros(1, length, dtype=torch.long, device=device)
        tokens[0, : len(context)] = torch.tensor(context, device=device)
        positions = torch.arange(length, device=device)[None]
        row = logits_of(tokens, positions)[0, len(context) - 1, : tokenizer.vocab_size].float()
        if temperature == 0.0:
            choice = int(row.argmax())
        else:
            weights = torch.softmax(row / temperature, 0)
            choice = int(torch.multinomial(weights, 1, generator=generator))
        if choice == tokenizer.eod and len(ids) > 1:
            break
        ids.append(choice)
    return tokenizer.decode([token for token in ids if token != tokenizer.eod])
