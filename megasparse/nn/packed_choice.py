"""Which path computes a linear of a packed model: the packed product or the dense one.

Each shape is measured on the GPU at hand at its first use, with all that surrounds the product and
with the host's time: a packed product keeps the host longer, and `generate` waits for the host when
tokens are few. What the host's time is worth depends on the whole model. So whole forward passes
are timed too, packed and dense in turn, and where dense is as fast everything is dense.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear as dense_linear

from megasparse.log import log_once
from megasparse.nn.packed_operands import Operands
from megasparse.sparsity.gemms.choice import Choice, GemmChooser

_REPEATS = 9
_ROUNDS = 5
_HEAD_START = 5_000_000  # cycles, about 3 ms
# A packed product has to take at most this part of the dense one's time: clocks are not exact.
_LINEAR_MARGIN = 0.95
_MODEL_MARGIN = 0.98
# Passes of each kind that are timed for a number of tokens.
_PASSES = 3
# Numbers of tokens up to this are measured one by one, larger ones by powers of two.
_EACH = 16


def bucket(tokens: int) -> int:
    """Numbers of tokens that share a choice."""
    return tokens if tokens <= _EACH else 1 << (tokens - 1).bit_length()


class Choices:
    """Which path computes which shape, for all linears of a model.

    Args:
        chooser: of cuSPARSELt's algorithms; None (on a CPU): the packed path, unmeasured.

    Attributes:
        measured: how many shapes were measured so far.
    """

    def __init__(self, chooser: GemmChooser | None) -> None:
        self._chooser = chooser
        self._known: dict[str, int | None] = {}
        self.measured = 0

    def algorithm(
        self, operands: Operands, x: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None
    ) -> int | None:
        """The library's algorithm for a product; None: the dense GEMM is faster."""
        if self._chooser is None:
            return 0
        packed, tokens = operands.packed, bucket(x.numel() // x.shape[-1])
        key = f"inference T {tokens}, N {packed.shape[0]}, K {packed.shape[1]}, {packed.dtype}"
        key += "" if bias is None else ", bias"
        if key not in self._known:
            self.measured += 1
            self._known[key] = self._measure(key, operands, x, w_NK, bias)
        return self._known[key]

    def _measure(
        self,
        key: str,
        operands: Operands,
        x: torch.Tensor,
        w_NK: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> int | None:
        assert self._chooser is not None
        product, expected = operands.product(x, bias), operands.expected(x, w_NK, bias)
        flops = 2 * x.numel() * w_NK.shape[0]
        choice: Choice = self._chooser.choose(key, flops, product, expected, least=0)
        if choice.sparse_ms == float("inf"):
            return None
        best = choice.algorithm

        def packed() -> object:
            operands.forget()
            return operands.whole(x, bias, best)

        def dense() -> object:
            return dense_linear(x, w_NK, bias)

        times: dict[Any, list[tuple[float, float]]] = {packed: [], dense: []}
        for _ in range(_ROUNDS):  # in turn: clocks change, and other work comes and goes
            for run, found in times.items():
                found.append(milliseconds(run))
        least = {run: sum(min(part) for part in zip(*times[run], strict=True)) for run in times}
        return best if least[packed] < _LINEAR_MARGIN * least[dense] else None


def milliseconds(run: Callable[[], object]) -> tuple[float, float]:
    """Time of a call: the device's and the host's."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)  # the device waits, so that its time holds none of the host's
    begin.record()
    start = time.perf_counter()
    for _ in range(_REPEATS):
        run()
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / _REPEATS, 1000 * host / _REPEATS


class WholePasses:
    """Times forward passes of a model, packed and dense in turn, until one of the two is faster.

    A pass is timed on the device, from the first packed linear to the end, waits for the host
    included. Nobody waits for the result. Passes in which shapes are measured do not count.

    Args:
        model: gets hooks.
        choices: of its linears.
    """

    def __init__(self, model: torch.nn.Module, choices: Choices) -> None:
        self._choices = choices
        self._inside = False
        self._mode: bool | None = None  # of the pass that goes on, from its first packed linear
        self._trial: tuple[int, bool, Any, int] | None = None
        self._pending: list[tuple[int, bool, Any, Any]] = []
        self._times: dict[int, dict[bool, list[float]]] = {}
        self._verdicts: dict[int, bool] = {}
        self._hooks = [
            model.register_forward_pre_hook(self._begins),
            model.register_forward_hook(self._ends),
        ]

    def packed(self, tokens: int) -> bool:
        """Whether the linears of the pass that goes on may take the packed path."""
        if not self._inside:
            return True  # the model's own forward was not called
        if self._mode is None:
            self._mode = self._decide(bucket(tokens))
        return self._mode

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _decide(self, tokens: int) -> bool:
        self._settle()
        if tokens in self._verdicts:
            return self._verdicts[tokens]
        if torch.cuda.is_current_stream_capturing():
            return True
        times = self._times.setdefault(tokens, {True: [], False: []})
        waiting = [mode for where, mode, _, _ in self._pending if where == tokens]
        counts = {mode: len(times[mode]) + waiting.count(mode) for mode in times}
        mode = counts[True] <= counts[False]
        self._trial = tokens, mode, self._now(), self._choices.measured
        return mode

    def _settle(self) -> None:
        """Take the times of passes that have ended on the device."""
        while self._pending and self._pending[0][3].query():
            tokens, mode, begin, end = self._pending.pop(0)
            times = self._times[tokens]
            times[mode].append(begin.elapsed_time(end))
            if tokens not in self._verdicts and min(map(len, times.values())) >= _PASSES:
                packed, dense = min(times[True]), min(times[False])
                self._verdicts[tokens] = packed < _MODEL_MARGIN * dense
                chosen = "packed" if self._verdicts[tokens] else "dense"
                log_once(
                    "passes of up to %d tokens: %s linears (packed %.2f ms, dense %.2f ms)",
                    tokens,
                    chosen,
                    packed,
                    dense,
                )

    @torch.compiler.disable
    def _begins(self, *_: object) -> None:
        self._inside, self._mode, self._trial = True, None, None

    @torch.compiler.disable
    def _ends(self, *_: object) -> None:
        self._inside = False
        if self._trial is not None and self._choices.measured == self._trial[3]:
            self._pending.append((*self._trial[:3], self._now()))
        self._trial = None

    @staticmethod
    def _now() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
