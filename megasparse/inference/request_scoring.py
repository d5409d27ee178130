"""Requests of one rank, answered by the model of all ranks: log-likelihoods and continuations.

Rank 0 asks; the others serve it until it says that it is done. Data-parallel copies share the
log-likelihoods, all with the same number of forward passes, which are collective calls in most
layouts. The model is used as it stands, so that nothing is written or converted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megasparse.distributed.control_plane import ControlPlane
from megasparse.inference.sampling import Sampling, choose_token
from megasparse.log import is_logging_rank
from megasparse.megatron.grid import Grid
from megasparse.progress import progress

Pair = tuple[list[int], list[int]]  # context, continuation


class Interrupted(Exception):
    """The run is to stop; raised on all ranks at the same batch."""


@dataclass(frozen=True)
class Continuation:
    """A request for text.

    Attributes:
        context: token ids.
        stops: texts that end it, which it does not contain.
        num_tokens: at most.
        temperature: 0 takes the most likely token.
    """

    context: list[int]
    stops: list[str]
    num_tokens: int
    temperature: float = 0.0


class RequestScorer:
    """Answers of a model that is spread over ranks.

    Args:
        control: of all ranks.
        grid: this rank's place.
        logits_of: `(B, S, V)` of tokens and positions `(B, S)`, whole on every rank of a copy.
        decode: text of token ids, without `eod`.
        eod: id that ends a document.
        max_length: of inputs in tokens; longer contexts lose their beginning.
        batch_size: sequences in a forward pass.
        seed: of draws.
        before_batch: called before each forward pass with its number, on all ranks; True: the run
            is to stop.
        waiting: called when rank 0 computes, and the others wait for what it wants next.
        pad_to: lengths are padded to a multiple (sequence parallelism needs divisible ones).
    """

    def __init__(
        self,
        control: ControlPlane,
        grid: Grid,
        logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        decode: Callable[[Sequence[int]], str],
        eod: int,
        max_length: int,
        batch_size: int,
        seed: int = 0,
        before_batch: Callable[[int], bool] = lambda _: False,
        waiting: Callable[[], object] = lambda: None,
        pad_to: int = 64,
    ) -> None:
        self._control, self._grid, self._logits_of = control, grid, logits_of
        self._decode, self._eod = decode, eod
        self.max_length, self._batch_size, self._pad_to = max_length, batch_size, pad_to
        self._seed, self._before_batch, self._waiting = seed, before_batch, waiting
        self._passes = 0
        self._writes = grid.tp_rank == 0 and grid.pp_rank == grid.pp_size - 1
        self._stream = sys.stderr
        self.in_pass = False  # an error there is of the model, on one rank maybe

    # Rank 0

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """For each pair the log-probability (nats) of the continuation after the context, and
        whether every token of it is the most likely one. Contexts are not empty."""
        asked = [number for number, (_, continuation) in enumerate(pairs) if continuation]
        wanted = [pairs[number] for number in asked]
        self._control.broadcast(["score", [list(pair) for pair in wanted]])
        found = self._score(wanted)
        assert found is not None
        self._waiting()
        answers = [(0.0, True)] * len(pairs)  # of nothing
        for number, answer in zip(asked, found, strict=True):
            answers[number] = answer
        return answers

    def continuations(self, requests: Sequence[Continuation]) -> list[str]:
        """The text of each request."""
        self._control.broadcast(["continue", [vars(request) for request in requests]])
        texts = self._continue(requests)
        self._waiting()
        return texts

    def done(self, result: Any) -> None:
        """Let the other ranks go, with a JSON value."""
        self._control.broadcast(["done", result])

    # The others

    def serve(self) -> Any:
        """Take part until rank 0 is done; its value."""
        while True:
            self._waiting()
            kind, content = self._control.broadcast(None)
            if kind == "done":
                return content
            if kind == "score":
                self._score([(context, continuation) for context, continuation in content])
            else:
                self._continue([Continuation(**request) for request in content])

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]] | None:
        """Those of this copy's share; on rank 0 all, in order; a collective call."""
        size, copies = self._batch_size, self._grid.dp_size
        # Long ones first: neighbours have about one length, and memory runs out at once if it does.
        order = sorted(range(len(pairs)), key=lambda n: -sum(map(len, pairs[n])))
        rounds = -(-len(pairs) // (size * copies))
        mine: list[tuple[int, float, bool]] = []
        for turn in self._bar(range(rounds), "tasks", "batch"):
            first = (turn * copies + self._grid.dp_rank) * size
            # A copy without work of its own takes the last pair again.
            batch = order[first : first + size] or order[-1:]
            scored = self._scored([pairs[number] for number in batch])
            mine += [(number, *one) for number, one in zip(batch, scored, strict=True)]
        found = self._control.collect(mine if self._writes else [])
        if found is None:
            return None
        answers = {number: (value, greedy) for part in found for number, value, greedy in part}
        return [answers[number] for number in range(len(pairs))]

    def _scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        rows, lengths = [], []
        for context, continuation in pairs:
            whole = (context + continuation)[-(self.max_length + 1) :]
            rows.append(whole[:-1])
            lengths.append((len(whole) - 1, whole[-min(len(continuation), len(whole) - 1) :]))
        logits = self._forward(rows)
        answers = []
        for row, (length, wanted) in zip(logits, lengths, strict=True):
            of_wanted = row[length - len(wanted) : length].float()
            target = torch.tensor(wanted, device=row.device)
            chosen = torch.log_softmax(of_wanted, -1).gather(1, target[:, None])
            answers.append((float(chosen.sum()), bool((of_wanted.argmax(-1) == target).all())))
        return answers

    def _forward(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Logits `(B, S, V)` of rows that are padded behind, where causal attention ignores it."""
        self._passes += 1
        if self._before_batch(self._passes - 1):
            raise Interrupted
        longest = max(map(len, rows))
        length = min(-(-longest // self._pad_to) * self._pad_to, self.max_length)
        device = self._grid.device
        tokens = torch.zeros(len(rows), length, dtype=torch.long, device=device)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row, device=device)
        positions = torch.arange(length, device=device).expand_as(tokens).contiguous()
        self.in_pass = True
        with torch.no_grad():
            logits = self._logits_of(tokens, positions)
        self.in_pass = False
        return logits

    def _continue(self, requests: Sequence[Continuation]) -> list[str]:
        """Every copy writes all texts: their lengths are not known before."""
        return [self._written(request) for request in self._bar(requests, "texts", "text")]

    def _written(self, request: Continuation) -> str:
        device = self._grid.device
        generator = torch.Generator(device).manual_seed(self._seed)
        sampling = Sampling(request.temperature)
        ids: list[int] = []
        text = ""
        for _ in range(request.num_tokens):
            context = (request.context + ids)[-self.max_length :]
            row = self._forward([context])[0, len(context) - 1]
            # Copies that disagree in a last bit would go apart.
            token = self._control.broadcast(choose_token(row, sampling, generator))
            if token == self._eod:
                break
            ids.append(token)
            text = self._decode(ids)
            ends = [text.index(stop) for stop in request.stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def _bar(self, work: Iterable[Any], desc: str, unit: str) -> Any:
        enabled = is_logging_rank()
        return progress(
            work, desc=desc, unit=unit, enabled=enabled, stream=self._stream, leave=False
        )
