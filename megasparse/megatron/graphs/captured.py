"""Transformer layers as CUDA graphs: captured once, replayed for every micro-batch.

A layer's forward pass is one graph and its backward pass another, cut at the residual stream. What
changes from micro-batch to micro-batch (seeds of draws) or from step to step (masks, packed
operands, scales) lies at fixed addresses and is filled in outside. Weight gradients are added up
inside the backward graphs, where the step's gradients are; where DeepSpeed wants every
micro-batch's (ZeRO 2), they leave the graphs as autograd's results.

torch's `make_graphed_callables` and Transformer Engine's take functions of tensors, capture them
with their parameters' hooks, and know one set of graphs; megatron-core's manager expects its own
gradient buffers and data parallelism. None has phases, seeds or a pipeline of DeepSpeed's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer

from megasparse.kernels import accumulate_
from megasparse.megatron.graphs.recorder import Recorder

# Beside the hidden state a layer is called with what stays the same, or with nothing.
_CONSTANT = ("rotary_pos_emb",)


class _Replay(torch.autograd.Function):
    """A layer's two graphs as one node; parameters are inputs where their gradients leave it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, pair: LayerPair, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.pair = pair
        return pair.replay_forward(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.pair.replay_backward(grads[0])


class LayerPair:
    """The forward and the backward graph of one layer, with the tensors at their ends.

    Args:
        layer: with its own, eager forward pass `run`.
        parameters: that get gradients.
        buffers: where their gradients are added up; None: they leave the graph.
        recompute: the backward graph computes the layer again from its input.
        constants: the arguments of the layer beside the hidden state; read at every replay.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        run: Callable[..., Any],
        parameters: Sequence[torch.nn.Parameter],
        buffers: Sequence[torch.Tensor] | None,
        recompute: bool,
        constants: dict[str, Any],
    ) -> None:
        self._layer, self._run, self._recompute = layer, run, recompute
        self._parameters, self._buffers, self._constants = parameters, buffers, constants

    def capture_forward(self, hidden: torch.Tensor, recorder: Recorder, pool: Any) -> torch.Tensor:
        """Record the forward pass; its output.

        Args:
            hidden: whose place in memory the input has; the output of the layer before.
        """
        self._hidden = hidden.detach().requires_grad_()
        (output,), self._forward = recorder.record(self._forward_pass, pool)
        self.output = output.detach()
        return self.output

    def capture_backward(self, grad_output: torch.Tensor, recorder: Recorder, pool: Any) -> Any:
        """Record the backward pass; the gradient of the input.

        Args:
            grad_output: whose place in memory the output's gradient has; the gradient of the input
                of the layer behind.
        """
        self._grad_output = grad_output
        (self._grad_hidden, *grads), replay = recorder.record(self._backward_pass, pool)
        self._backward = recorder.leaving_generator(replay) if self._recompute else replay
        self._grads = tuple(grads)
        return self._grad_hidden

    def _forward_pass(self) -> tuple[torch.Tensor]:
        with (
            torch.set_grad_enabled(not self._recompute),
            _own_leaves(self._layer) as self._leaves,
        ):
            self._in_graph = self._compute()
        return (self._in_graph,)

    def _backward_pass(self) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad(), _own_leaves(self._layer) as again:
            output, leaves = self._in_graph, self._leaves
            if self._recompute:
                output, leaves = self._compute(), again
            inputs = (self._hidden, *(leaves[p] for p in self._parameters))
            # What the graphs share must not outlive the capture: its memory is used again.
            del self._in_graph, self._leaves
            found = torch.autograd.grad(output, inputs, self._grad_output, allow_unused=True)
        if self._buffers is None:
            return found
        for buffer, gradient in zip(self._buffers, found[1:], strict=True):
            if gradient is not None:
                accumulate_(buffer, gradient)
        return found[:1]

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
        self._forward()
        return self.output.detach()

    def replay_backward(self, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the inputs of `_Replay`.

        A parameter's is the graph's own tensor, which is referred to from here too: autograd copies
        such a one where it would take another over as `grad`.
        """
        _put(self._grad_output, grad_output)
        self._backward()
        return self._grad_hidden.detach(), None, *self._grads


class GraphedLayer:
    """A layer's `forward`: replayed where its graphs are in use, else the layer's own.

    Of a layer with experts the attention alone: how many tokens each expert gets is known in the
    step, and the host waits for it.

    Args:
        layer: a Transformer layer; its `forward` is replaced, with experts that of its attention.
        recompute: whether it is recomputed in the backward pass.

    Attributes:
        whole: whether its output is the layer's.
    """

    def __init__(self, layer: torch.nn.Module, recompute: bool) -> None:
        self.layer, self.recompute = layer, recompute
        self.whole = not isinstance(getattr(layer, "mlp", None), MoELayer)
        name = "forward" if self.whole else "_forward_attention"
        self.eager: Callable[..., Any] = getattr(layer, name)
        self.pair: LayerPair | None = None
        self.seen: tuple[torch.Tensor, dict[str, Any]] | None = None
        setattr(layer, name, self)

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
        if self.seen is None:
            return "a layer was not called with gradients"
        changing = (torch.Tensor, PackedSeqParams)
        tensors = [k for k, v in self.seen[1].items() if isinstance(v, changing)]
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
    forward = block.forward

    def run(*args: Any, **arguments: Any) -> torch.Tensor:
        if not is_replayed(block.layers[0]):
            return forward(*args, **arguments)
        config = block.config
        block.config = copy.copy(config)  # others read it too
        block.config.recompute_granularity = None
        try:
            return forward(*args, **arguments)
        finally:
            block.config = config

    block.forward = run


class GraphSet:
    """All layers of a rank, captured for one kind of step and one micro-batch under way.

    Its pool is its own: the passes of other micro-batches come between its forward and backward.

    Args:
        layers: in the order of execution; each has seen a call.
        buffers: where gradients of parameters are added up; None: they leave the graphs.
        recorder: makes the graphs.
        around: makes a context for the forward pass of a layer.
        captured: called after each pass of a layer, of which there are two.
    """

    def __init__(
        self,
        layers: Sequence[GraphedLayer],
        buffers: Mapping[torch.nn.Parameter, torch.Tensor] | None,
        recorder: Recorder,
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        captured: Callable[[], object] = lambda: None,
    ) -> None:
        self.pairs: list[LayerPair] = []
        pool = recorder.new_pool()
        first = layers[0].seen
        assert first is not None

        def place() -> torch.Tensor:
            return torch.zeros_like(first[0], device=recorder.device)

        hidden, grad = place(), place()
        for layer in layers:
            assert layer.seen is not None
            parameters = layer.parameters
            own = None if buffers is None else [buffers[p] for p in parameters]
            pair = LayerPair(
                layer.layer, layer.eager, parameters, own, layer.recompute, layer.seen[1]
            )
            with around():
                hidden = pair.capture_forward(hidden, recorder, pool)
            self.pairs.append(pair)
            if not layer.whole:  # what it gives goes through experts before the next layer has it
                hidden = place()
            captured()
        for layer, pair in zip(reversed(layers), reversed(self.pairs), strict=True):
            grad = pair.capture_backward(grad if layer.whole else place(), recorder, pool)
            captured()


@contextlib.contextmanager
def _own_leaves(
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
