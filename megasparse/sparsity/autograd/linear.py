"""The autograd function of a linear layer: three GEMMs, with communication around them.

    forward    x = gather(x_local);            z, saved = output_and_saved(x)
    backward   start gather(x_local);  g = prepare_grad_output(dz);  dx = grad_input(g);
               start reduce(dx);  wait for x;  dw = grad_weight(g, saved);  wait for dx

A low-rank branch (SLoRB) joins where the GEMMs are: `z += (x P^T) S^T` before, `dx += (dz S) P`
after, so that it shares their communication.

X travels while `dX` is computed, and `dX` while `dW` is: that is why communication surrounds the
GEMMs and is not a separate autograd node. A bias is added by the GEMM, before its result is
rounded; one that is to be added to a sum over ranks is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from megasparse.fp8.scale import Scale
from megasparse.kernels.packed24 import E4M3
from megasparse.kernels.random import SeedLike
from megasparse.sparsity.autograd.norm import Float8Input
from megasparse.sparsity.gemms.protocol import Deferred, LinearGemms, SavedInput, weight_gradient
from megasparse.sparsity.slorb import LowRankBranch

# Of a layer's draws; a function is asked in the backward pass, once.
Seed = SeedLike | Callable[[], SeedLike]


def asked(seed: Seed) -> SeedLike:
    """The seed itself."""
    return seed() if callable(seed) else seed


class LinearComm(Protocol):
    """What happens to the input before, and to its gradient after, the GEMMs of this rank.

    Attributes:
        gathers: the GEMMs see more than this rank holds; it is gathered again in the backward pass
            rather than kept, which is what sequence parallelism saves memory for.
    """

    gathers: bool

    def gather(self, x_local: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        """Start to gather the input that the GEMMs see, `(S, ..., K)` of `(S/p, ..., K)`; it is
        valid after calling `wait`."""
        ...

    def reduce(self, dx: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        """Start to reduce the gradient of that input, to the shape that it had before `gather`; the
        result is valid after calling `wait`."""
        ...

    def own_part(self, tokens: int) -> int | None:
        """Where this rank's `tokens` begin among those gathered, if it pays to multiply them while
        the others travel."""
        ...


class NoComm:
    """A linear layer whose rank holds its whole input."""

    gathers = False

    def gather(self, x_local: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        return x_local, lambda: None

    def reduce(self, dx: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        return dx, lambda: None

    def own_part(self, tokens: int) -> int | None:
        return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_local: torch.Tensor,
        weight: torch.Tensor,
        s_NR: torch.Tensor | None,
        p_RK: torch.Tensor | None,
        gemms: LinearGemms,
        comm: LinearComm,
        branch: LowRankBranch | None,
        seed: Seed,
        recorded: bool,
        quantized: Float8Input | None,
        lacks: Deferred | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.gemms, ctx.comm, ctx.branch, ctx.seed = gemms, comm, branch, seed
        ctx.deferred = deferred_of(quantized, comm)
        local = local_input(x_local, comm, quantized)
        h_TR = None
        save = recorded and ctx.needs_input_grad[1]
        x, z_TN, saved = gathered_output(
            gemms, comm, local, quantized, save, weight.shape[0], bias, lacks
        )
        if branch is not None:
            assert s_NR is not None
            h_TR = branch.project(x.reshape(-1, x.shape[-1]), p_RK)
            z_TN = z_TN.addmm_(h_TR, s_NR.t())
        again = comm.gathers or p_RK is not None
        if comm.gathers:
            saved = ()
        ctx.save_for_backward(local if again else None, s_NR, p_RK, h_TR, *saved)
        return z_TN.view(*whole_shape(x_local, local, x), z_TN.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dz,) = grads
        local, s_NR, p_RK, h_TR, *saved = ctx.saved_tensors
        dz_TN = dz.reshape(-1, dz.shape[-1])
        dx, dw, ds, dp, x_TK, arrived, wait = None, None, None, None, None, None, None
        wanted = ctx.needs_input_grad
        if local is not None and wanted[1]:
            x, arrived = start_gather(ctx.comm, local)
            x_TK = x.reshape(-1, x.shape[-1])
        dh_TR = None if h_TR is None else ctx.branch.grad_hidden(dz_TN, s_NR)
        sums = room_for_sums(dz_TN) if wanted[-1] else None
        operands = ctx.gemms.prepare_grad_output(dz_TN, asked(ctx.seed), sums)
        if wanted[0]:
            dx_TK = ctx.gemms.grad_input(operands, ctx.deferred)
            if dh_TR is not None:
                dx_TK = ctx.branch.add_grad_input_(dx_TK, dh_TR, p_RK)
            dx, wait = ctx.comm.reduce(dx_TK.view(*dz.shape[:-1], dx_TK.shape[-1]))
        if wanted[1]:
            if arrived is not None:
                arrived()
            if not saved:
                assert x_TK is not None
                saved = list(saved_again(ctx.gemms, x_TK))
            dw = weight_gradient(ctx.gemms, operands, tuple(saved))
            if dh_TR is not None:
                ds = dz_TN.t() @ h_TR
                dp = None if p_RK is None else ctx.branch.grad_projection(dh_TR, x_TK)
        db = None if sums is None else sums.to(dz.dtype)
        if wait is not None:
            wait()
        return dx, dw, ds, dp, *(None,) * 7, db


def room_for_sums(dz_TN: torch.Tensor) -> torch.Tensor:
    """Memory for the sums over tokens that a bias's gradient is, at least float32."""
    wide = torch.promote_types(dz_TN.dtype, torch.float32)
    return dz_TN.new_empty(dz_TN.shape[1], dtype=wide)


def local_input(
    x_local: torch.Tensor, comm: LinearComm, quantized: Float8Input | None
) -> torch.Tensor:
    """What this rank has of the input: where it is gathered, in the 8 bits that GEMMs read."""
    return quantized.rows if quantized is not None and comm.gathers else x_local


def start_gather(
    comm: LinearComm, local: torch.Tensor
) -> tuple[torch.Tensor, Callable[[], object]]:
    """Start to gather an input; it is valid after calling the second. e4m3 travels as bytes."""
    if local.dtype != E4M3:
        return comm.gather(local)
    x, arrived = comm.gather(local.view(torch.uint8))
    return x.view(E4M3), arrived


def whole_shape(x_local: torch.Tensor, local: torch.Tensor, x: torch.Tensor) -> tuple[int, ...]:
    """The leading dimensions of the gathered input, `(S, ...)` of `x_local` `(S/p, ..., K)`.

    Args:
        local, x: what was gathered, and the result; e4m3 has one dimension for all tokens.
    """
    return (x_local.shape[0] * (x.shape[0] // local.shape[0]), *x_local.shape[1:-1])


def saved_again(gemms: LinearGemms, x_TK: torch.Tensor) -> SavedInput:
    """What `grad_weight` needs of an input that was gathered again."""
    return gemms.save_quantized(x_TK) if x_TK.dtype == E4M3 else gemms.save_input(x_TK)


def gathered_output(
    gemms: LinearGemms,
    comm: LinearComm,
    local: torch.Tensor,
    quantized: Float8Input | None,
    save: bool,
    width: int,
    bias: torch.Tensor | None = None,
    deferred: Deferred | None = None,
) -> tuple[torch.Tensor, torch.Tensor, SavedInput]:
    """The gathered X, `X W~^T + bias`, and with `save` what `grad_weight` needs of X.

    Args:
        local: of `local_input`.
        quantized: its operands, where it is quantized already.
        width: N.
        deferred: may get what the product still lacks.
    """
    x, arrived = start_gather(comm, local)
    if quantized is not None and comm.gathers:
        return x, _output_by_parts(gemms, comm, local, quantized.scale, x, arrived, width, bias), ()
    arrived()
    x_TK = x.reshape(-1, x.shape[-1])
    if quantized is not None:
        operands = quantized.rows, quantized.columns
        tokens, scale = x_TK.shape[0], quantized.scale
        return x, *gemms.output_of_quantized(*operands, tokens, scale, bias, deferred=deferred)
    return x, *gemms.output_and_saved(x_TK, bias, save, deferred)


def _output_by_parts(
    gemms: LinearGemms,
    comm: LinearComm,
    local: torch.Tensor,
    scale: Scale,
    x: torch.Tensor,
    arrived: Callable[[], object],
    width: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`X W~^T + bias` of a quantized X that is on its way; of this rank's own tokens meanwhile."""
    own, whole, start = local.shape[0], x.shape[0], comm.own_part(local.shape[0])
    if start is None:
        arrived()
        return gemms.output_of_quantized(x, None, whole, scale, bias)[0]
    z_TN = torch.empty(whole, width, dtype=torch.bfloat16, device=x.device)
    gemms.output_of_quantized(local, None, own, scale, bias, out=z_TN[start : start + own])
    arrived()
    for begin, end in ((0, start), (start + own, whole)):
        if begin < end:
            part = slice(begin, end)
            gemms.output_of_quantized(x[part], None, end - begin, scale, bias, out=z_TN[part])
    return z_TN


def deferred_of(quantized: Float8Input | None, comm: LinearComm) -> Deferred | None:
    """Where to leave what the gradient of an input lacks: with the norm that it goes to.

    Not where it is summed before: another rank may have computed its part by a dense GEMM.
    """
    return quantized.deferred if quantized is not None and type(comm) is NoComm else None


def in_graph(x: torch.Tensor | Float8Input) -> tuple[torch.Tensor, Float8Input | None]:
    """The tensor that autograd knows x by, and its operands where it is quantized already."""
    return (x.placeholder, x) if isinstance(x, Float8Input) else (x, None)


def linear(
    x: torch.Tensor | Float8Input,
    weight: torch.Tensor,
    gemms: LinearGemms,
    comm: LinearComm | None = None,
    seed: Seed = 0,
    branch: LowRankBranch | None = None,
    adapter: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    deferred: Deferred | None = None,
) -> torch.Tensor:
    """`x W~^T + bias` with gradients, through the three GEMMs; with a branch `+ (x P^T) S^T`.

    Args:
        x: `(..., K)`.
        weight: the master weight `(N, K)`; gets the straight-through gradient `dZ^T X`.
        gemms: operands and GEMMs of the current optimizer step.
        comm: communication of the input and its gradient; none by default.
        seed: of the MVUE draws of this layer and micro-batch; a function is asked for it in the
            backward pass, once.
        branch: the low-rank one of SLoRB; none by default.
        adapter, projection: its S `(N, R)` and P `(R, K)`; P None for sums over groups.
        bias: `(N,)`; none by default.
        deferred: may get what the result still lacks, for whoever reads it; gradients are of the
            result with it. Without a branch.

    Returns:
        `(..., N)`; the leading dimensions are those of the gathered input.
    """
    recorded = torch.is_grad_enabled()  # inside the function it is off
    comm = comm or NoComm()
    x, quantized = in_graph(x)
    assert quantized is None or branch is None, "x has no values to project"
    assert deferred is None or branch is None, "a branch adds to the result"
    how = (gemms, comm, branch, seed, recorded, quantized, deferred)
    return _Linear.apply(x, weight, adapter, projection, *how, bias)
