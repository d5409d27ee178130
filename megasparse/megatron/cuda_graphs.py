"""Transformer layers as CUDA graphs: captured once, replayed for every micro-batch.

A layer's forward pass is one graph and its backward pass another, cut at the residual stream. What
changes from micro-batch to micro-batch (seeds of draws) or from step to step (masks, packed
operands, scales) lies at fixed addresses and is filled in outside. Weight gradients are added up
inside the backward graphs, in buffers that DeepSpeed is given with the last micro-batch; where it
wants every micro-batch's (ZeRO 2), they leave the graphs as autograd's results.

    step 1 of a phase   eager: kernels are compiled, GEMMs chosen, first scales found
    step 2              captured, all layers in the order of execution, in one memory pool
    step 2, 3, ...      replayed

torch's `make_graphed_callables` and Transformer Engine's take functions of tensors, capture them
with their parameters' hooks, and know one set of graphs; megatron-core's manager expects its own
gradient buffers and data parallelism. None has phases, seeds or a pipeline of DeepSpeed's.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megasparse.kernels.spmm24.binding import reserve_workspace
from megasparse.log import logger

# Beside the hidden state a layer is called with what stays the same, or with nothing.
_CONSTANT = ("rotary_pos_emb",)


class _Replay(torch.autograd.Function):
    """A layer's two graphs as one node; parameters are inputs where their gradients leave it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, graphs: LayerPair, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.graphs = graphs
        return graphs.replay_forward(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.graphs.replay_backward(grads[0])


class LayerPair:
    """The forward and the backward graph of one layer, with the tensors at their ends.

    Args:
        layer: with its own, eager forward pass `run`.
        parameters: that get gradients.
        buffers: where their gradients are added up; None: they leave the graph.
        recompute: the backward graph computes the layer again from its input.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        run: Callable[..., Any],
        parameters: Sequence[torch.nn.Parameter],
        buffers: Sequence[torch.Tensor] | None,
        recompute: bool,
    ) -> None:
        self._layer, self._run, self._recompute = layer, run, recompute
        self._parameters, self._buffers = parameters, buffers
        self._graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._grads: tuple[torch.Tensor | None, ...] = ()

    def capture_forward(self, hidden: torch.Tensor, constants: dict[str, Any], pool: Any) -> None:
        """Record the forward pass.

        Args:
            hidden: whose place in memory the input has; the output of the layer before.
            constants: the other arguments.
        """
        self._hidden = hidden.detach().requires_grad_()
        self._constants = constants  # they are read at every replay
        with (
            _capturing(self._graphs[0], pool),
            torch.set_grad_enabled(not self._recompute),
            _leaves_of_this_stream(self._layer) as self._leaves,
        ):
            self.output = self._compute()

    def capture_backward(self, grad_output: torch.Tensor, pool: Any) -> torch.Tensor:
        """Record the backward pass; the gradient of the input.

        Args:
            grad_output: whose place in memory the output's gradient has; the gradient of the input
                of the layer behind.
        """
        self._grad_output = grad_output
        with (
            _capturing(self._graphs[1], pool),
            torch.enable_grad(),
            _leaves_of_this_stream(self._layer) as again,
        ):
            output = self.output
            if self._recompute:
                self._leaves, output = again, self._compute()
            leaves = [self._leaves[p] for p in self._parameters]
            found = torch.autograd.grad(
                output, (self._hidden, *leaves), grad_output, allow_unused=True
            )
            if self._buffers is None:
                self._grads = found[1:]
            else:
                pairs = [(b, g) for b, g in zip(self._buffers, found[1:]) if g is not None]
                torch._foreach_add_([b for b, _ in pairs], [g for _, g in pairs])
        del output
        self.output = self.output.detach()
        self._leaves = {}
        self._grad_hidden = found[0]
        return found[0]

    def _compute(self) -> torch.Tensor:
        output: torch.Tensor = self._run(hidden_states=self._hidden, **self._constants)[0]
        return output

    def replay(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer of the hidden state, with gradients."""
        parameters = self._parameters if self._buffers is None else ()
        return _Replay.apply(hidden, self, *parameters)

    def replay_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output, in a place that the next micro-batch takes."""
        _put(self._hidden, hidden)
        self._graphs[0].replay()
        return self.output.detach()

    def replay_backward(self, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the inputs of `_Replay`.

        A parameter's is the graph's own tensor, which is referred to from here too: autograd copies
        such a one where it would take another over as `grad`.
        """
        _put(self._grad_output, grad_output)
        self._graphs[1].replay()
        return self._grad_hidden.detach(), None, *self._grads


class GraphedLayer:
    """A layer's `forward`: replayed where its graphs are in use, else the layer's own.

    Args:
        layer: a Transformer layer; its `forward` is replaced.
        recompute: whether it is recomputed in the backward pass.
    """

    def __init__(self, layer: torch.nn.Module, recompute: bool) -> None:
        self.layer, self.eager, self.recompute = layer, layer.forward, recompute
        self.pair: LayerPair | None = None
        self.seen: tuple[torch.Tensor, dict[str, Any]] | None = None
        layer.forward = self  # type: ignore[method-assign, assignment]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """That get gradients."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    def __call__(self, hidden_states: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, Any]:
        """What the layer gives: hidden state and context."""
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.eager(hidden_states=hidden_states, **arguments)
        if self.pair is not None:
            return self.pair.replay(hidden_states), None
        given = {k: v for k, v in arguments.items() if v is not None}
        self.seen = (torch.empty_like(hidden_states, device="meta"), given)
        return self.eager(hidden_states=hidden_states, **arguments)

    def refusal(self) -> str | None:
        """Why the call that was seen cannot be captured, or None."""
        assert self.seen is not None
        tensors = [k for k, v in self.seen[1].items() if isinstance(v, torch.Tensor)]
        others = sorted(set(tensors) - set(_CONSTANT))
        if others:
            return f"layers are called with {', '.join(others)}, which change"
        modules = list(self.layer.modules())
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules):
            return "a module of a layer has hooks"
        return None


def is_replayed(layer: torch.nn.Module) -> bool:
    """Whether the layer's next pass is a replay; one that is recomputed sees to that itself."""
    forward = layer.forward
    return isinstance(forward, GraphedLayer) and forward.pair is not None


def let_replays_recompute(block: Any) -> None:
    """Have megatron-core's TransformerBlock leave recomputation to layers that are replayed."""
    checkpointed = block._checkpointed_forward

    def forward(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if not is_replayed(block.layers[0]):
            return checkpointed(hidden_states=hidden_states, **arguments)
        for layer in block.layers:
            hidden_states, _ = layer(hidden_states=hidden_states)
        return hidden_states

    block._checkpointed_forward = forward


class GraphSet:
    """All layers of a rank, captured for one kind of step and one micro-batch under way.

    Its pool is its own: the passes of other micro-batches come between its forward and backward.

    Args:
        layers: in the order of execution; each has seen a call.
        buffers: where gradients of parameters are added up; None: they leave the graphs.
        around: makes a context for the forward pass of a layer.
    """

    def __init__(
        self,
        layers: Sequence[GraphedLayer],
        buffers: dict[torch.nn.Parameter, torch.Tensor] | None,
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.pairs = []
        pool = torch.cuda.graph_pool_handle()
        first = layers[0].seen
        assert first is not None
        # Empty, but for its place in memory; gradients of what is captured say nothing either.
        hidden = torch.empty_like(first[0], device=torch.cuda.current_device())
        grad = torch.empty_like(hidden)
        for layer in layers:
            assert layer.seen is not None
            parameters = layer.parameters
            own = None if buffers is None else [buffers[p] for p in parameters]
            pair = LayerPair(layer.layer, layer.eager, parameters, own, layer.recompute)
            with around():
                pair.capture_forward(hidden, layer.seen[1], pool)
            hidden = pair.output
            self.pairs.append(pair)
        for pair in reversed(self.pairs):
            grad = pair.capture_backward(grad, pool)


class Replayed:
    """One function without arguments, captured at its second call and replayed from then on."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run, self._calls = run, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, stream: torch.cuda.Stream) -> None:
        """Run it."""
        self._calls += 1
        if self._calls == 1:
            self._run()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with prepared_for_capture(stream), _capturing(self._graph, None):
                self._run()
        self._graph.replay()


@contextlib.contextmanager
def prepared_for_capture(stream: torch.cuda.Stream) -> Iterator[None]:
    """Captures happen within it, on `stream`: memory is tidy, and nothing collects garbage."""
    reserve_workspace(stream)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    collecting = gc.isenabled()
    gc.disable()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        if collecting:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    # Other threads (of the data loader, of saves) go on using the device meanwhile.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    finally:
        graph.capture_end()


@contextlib.contextmanager
def _leaves_of_this_stream(
    layer: torch.nn.Module,
) -> Iterator[dict[torch.nn.Parameter, torch.nn.Parameter]]:
    """Within it the layer has other leaves in the places of its parameters, on the same memory.

    autograd ties a leaf to the stream of its first use and waits for that stream in every backward
    pass: of the parameters' own that is not the stream of the capture.
    """
    leaves: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    places = []
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in leaves:
                    leaf = torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
                    leaf.__dict__.update(parameter.__dict__)
                    leaves[parameter] = leaf
                places.append((module, name, parameter))
    try:
        for module, name, parameter in places:
            module._parameters[name] = leaves[parameter]
        yield leaves
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _put(place: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value` to where a graph reads it, unless it is there."""
    if value.data_ptr() != place.data_ptr():
        with torch.no_grad():
            place.copy_(value)


def log_capture(kind: str, layers: int, seconds: float, gib: float) -> None:
    """One line on a capture."""
    logger.info(
        "CUDA graphs: %d layers captured for %s in %.1f s, %.2f GiB", layers, kind, seconds, gib
    )
