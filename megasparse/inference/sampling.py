"""Continue a prompt: with the model of a run as it trains, or with a loaded one and a cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from megasparse.data.tokenizers.tokenizer import Tokenizer, begin
from megasparse.errors import ConfigError
from megasparse.megatron.grid import Grid
from megasparse.megatron.inference import CachedDecoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens; 0: all.
        top_p: of those, only the most likely ones that together reach this probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature}, expected 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k}, expected 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p {self.top_p}, expected above 0 and at most 1")


def choose_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id by the logits `(V,)`; one draw of the generator, none if greedy."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    weights = torch.softmax(logits.float() / sampling.temperature, 0)
    weights, order = weights.sort(descending=True, stable=True)
    if sampling.top_k:
        weights[sampling.top_k :] = 0.0
    weights /= weights.sum()
    # A token stays while those before it have not reached top_p: the first always does.
    weights[weights.cumsum(0) - weights >= sampling.top_p] = 0.0
    return int(order[torch.multinomial(weights, 1, generator=generator)])


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens of a text as a document begins; of an empty one the token that ends a document."""
    return begin(tokenizer) + tokenizer.encode(prompt) or [tokenizer.eod]


def generate_text(
    decoder: CachedDecoder,
    grid: Grid,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: Sampling,
    seed: int,
    ends: Collection[int] = (),
) -> str:
    """The continuation of a prompt, up to `num_tokens` tokens or the end of the document.

    Every rank of the grid takes part; what the first draws, all take.

    Args:
        decoder: fresh; with room for prompt and continuation.
        prompt: at least one token.
        ends: other tokens that end it.
        seed: of the draws, the same whatever the tensor-parallel size.
    """
    device = grid.device
    generator = torch.Generator(device).manual_seed(seed)
    fed, written = list(prompt), []
    for _ in range(num_tokens):
        logits = decoder.feed(torch.tensor([fed], device=device))[0, : tokenizer.vocab_size]
        choice = torch.tensor(choose_token(logits, sampling, generator), device=device)
        token = int(grid.from_first_of_tp(choice))
        if token == tokenizer.eod or token in ends:
            break
        written.append(token)
        fed = [token]
    return tokenizer.decode(written)


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
    sampling = Sampling(temperature)
    ids = prompt_ids(tokenizer, prompt)
    for _ in range(num_tokens):
        context = ids[-max_length:]
        length = min(-(-len(context) // pad_to) * pad_to, max_length)
        tokens = torch.zeros(1, length, dtype=torch.long, device=device)
        tokens[0, : len(context)] = torch.tensor(context, device=device)
        positions = torch.arange(length, device=device)[None]
        row = logits_of(tokens, positions)[0, len(context) - 1, : tokenizer.vocab_size]
        choice = choose_token(row, sampling, generator)
        if choice == tokenizer.eod and len(ids) > 1:
            break
        ids.append(choice)
    begins = len(begin(tokenizer))
    return tokenizer.decode([token for token in ids[begins:] if token != tokenizer.eod])
