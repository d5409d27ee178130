"""Rows of `kernels` for kernels that prepare a whole operand: what they fuse, beside them.

Transformer Engine's cast-transpose, the dense counterpart of a gradient's preparation, is measured
where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from megasparse import kernels
from megasparse.fp8.delayed import DelayedScaling
from megasparse.fp8.transformer_engine import refusal
from tools.bench.parts.kernel_cases import BF16, E4M3, FP32, SHORT, Case, Inputs, Source, Step

E5M2 = torch.float8_e5m2


def transformer_engine_is_there() -> bool:
    """Whether it is installed, with a GPU that it supports."""
    return torch.cuda.is_available() and refusal(torch.device("cuda")) is None


def transformer_engine_cast_transpose(t: Inputs) -> Step:
    """TE's quantization of t[0] to e4m3, row-major and transposed, with its amax."""
    scaling = DelayedScaling(t[0].device)
    quantizer = scaling.quantizer()
    scaling.allocate()
    quantizer.scale_for(t[0])
    return lambda: quantizer.quantized(t[0], columns=True)


def operand_cases() -> list[Case]:
    """Weights and gradients prepared for the GEMMs, with the maxima of delayed scaling."""
    cases = []
    # Read: w and its mask; written: values and metadata, both ways (or dense the other way).
    for source, dtype, size in ((BF16, E4M3, 4.25), (FP32, E4M3, 6.25), (BF16, BF16, 5.25)):
        cases.append(
            Case(
                f"weight_pack24 {SHORT[source]} to {SHORT[dtype]}, mask, both packed",
                "weight_pack24",
                size,
                partial(
                    lambda s, source, dtype: (
                        s.normal(source),
                        s.transposable(),
                        s.number(100.0) if dtype == E4M3 else None,
                        *s.maxima(1),
                    ),
                    source=source,
                    dtype=dtype,
                ),
                partial(
                    lambda op, t, dtype: partial(
                        op, t[0], t[1], dtype=dtype, scale=t[2], amax=t[3]
                    ),
                    dtype=dtype,
                ),
                odd_shape=(256, 384),
                others=unfused_weight(dtype),
            )
        )
    cases.append(
        Case(
            "weight_pack24 bf16 to e4m3, soft threshold, transpose dense",
            "weight_pack24",
            3.625,
            lambda s: (s.normal(), s.number(1.4), s.number(100.0), *s.maxima(1)),
            lambda op, t: partial(
                op,
                t[0],
                threshold_scale=t[1],
                dtype=E4M3,
                scale=t[2],
                amax=t[3],
                transposed="dense",
            ),
            odd_shape=(192, 384),
        )
    )
    cases += double_pruned_cases()
    found = transformer_engine_is_there()
    others = {"Transformer Engine cast-transpose": transformer_engine_cast_transpose}
    for exact, row_dtype, size in ((True, E5M2, 3.625), (True, None, 2.625), (False, E5M2, 3.625)):
        row = "packed alone" if row_dtype is None else "e5m2 rows and packed"
        cases.append(
            Case(
                f"grad_pack24 {'exact' if exact else 'approx'} bf16, {row}",
                "grad_pack24",
                size,
                lambda s: (s.normal(), s.number(1000.0), s.number(50.0), *s.maxima(2)),
                partial(prepare_gradient, exact=exact, row_dtype=row_dtype),
                odd_shape=(515, 192),
                others=others if found else {},
                # The approximate sampler's magnitudes agree to 1e-6: now and then another byte.
                wrong_share=0.0 if exact else 1e-3,
            )
        )
    cases.append(
        Case(
            "mvue_pack24 exact bf16",
            "mvue_pack24",
            3.125,
            lambda s: (s.normal(),),
            lambda op, t: partial(op, t[0], seed=7),
            odd_shape=(515, 192),
        )
    )
    return [*cases, *gated_cases(), *norm_cases(), rotary_case()]


def double_pruned_cases() -> Iterator[Case]:
    """Both operands of a weight whose grad_input is double-pruned."""
    # Nothing but w is read; both are packed.
    for dtype, size in ((E4M3, 3.25), (BF16, 4.25)):
        yield Case(
            f"weight_pack24 bf16 to {SHORT[dtype]}, soft threshold, double-pruned",
            "weight_pack24",
            size,
            partial(_soft_threshold_inputs, dtype=dtype),
            partial(_double_pruned, dtype=dtype),
            odd_shape=(256, 384),
        )


def _soft_threshold_inputs(s: Source, dtype: torch.dtype) -> Inputs:
    scale = s.number(100.0) if dtype == E4M3 else None
    return (s.normal(), s.number(1.4), scale, *s.maxima(1))


def _double_pruned(op: Callable[..., Any], t: Inputs, dtype: torch.dtype) -> Step:
    how = {"dtype": dtype, "scale": t[2], "amax": t[3], "transposed": "double-pruned"}
    return partial(op, t[0], threshold_scale=t[1], **how)


def gated_cases() -> list[Case]:
    """The gated activation fused with the preparation of the GEMMs' operands; (T, F) of a half."""

    def forward(s: Source) -> Inputs:
        return (torch.cat([s.normal(), s.normal()], 1), s.number(100.0), *s.maxima(1))

    def backward(s: Source) -> Inputs:
        scales = (s.number(100.0), s.number(25.0), *s.maxima(2))
        return (s.normal(), torch.cat([s.normal(), s.normal()], 1), *scales)

    # A sigmoid's last bit decides now and then how a number is rounded.
    shared: dict[str, Any] = {"odd_shape": (131, 64), "wrong_share": 1e-3}
    return [
        Case(
            "activation_float8 bf16, both ways",
            "activation_float8",
            6,
            forward,
            lambda op, t: partial(op, t[0], scale=t[1], amax=t[2]),
            others={"swiglu_fused alone": lambda t: partial(kernels.swiglu_fused, t[0])},
            **shared,
        ),
        Case(
            "activation_grad_pack24 exact bf16, e4m3 rows and packed",
            "activation_grad_pack24",
            9.25,
            backward,
            lambda op, t: partial(
                op,
                t[0],
                t[1],
                seed=7,
                row_scale=t[2],
                row_dtype=E4M3,
                packed_scale=t[3],
                row_amax=t[4],
                packed_amax=t[5],
            ),
            others={"activation_backward, grad_pack24": unfused_gradient},
            **shared,
        ),
    ]


def rotary_case() -> Case:
    """A projection of 8 groups of four queries, in four sequences where they divide the tokens."""

    def inputs(s: Source) -> Inputs:
        tokens, width = s.shape
        batch, channels = 4 if tokens % 4 == 0 else 1, width // 48
        fused = s.normal().view(-1, batch, width)
        half = torch.arange(fused.shape[0], device=s.device)[:, None] / torch.logspace(
            0, 4, channels // 2, device=s.device
        )
        return fused, torch.cat([half, half], 1)

    def prepare(op: Callable[..., Any], t: Inputs) -> Step:
        return partial(op, *t, kernels.Heads(8, 4, t[1].shape[1]))

    return Case(
        "rotary_qkv bf16",
        "rotary_qkv",
        4,
        inputs,
        prepare,
        shape=(16384, 6144),
        odd_shape=(131, 96),
        wrong_share=2e-3,
    )


def norm_cases() -> list[Case]:
    """The norms fused with the preparation of their output; (T, H)."""
    found, name = transformer_engine_is_there(), "Transformer Engine's norm, cast-transpose"

    def inputs(s: Source, bias: bool) -> Inputs:
        row = Source((1, s.shape[1]), s.device, s.generator)
        weight, shift = (row.normal().view(-1) for _ in range(2))
        return (s.normal(), weight, shift if bias else None, s.number(100.0), *s.maxima(1))

    def prepare(op: Callable[..., Any], t: Inputs, centred: bool) -> Step:
        # The statistics' last bits follow from the order of additions: operands are compared.
        return lambda: op(t[0], t[1], t[2], centred=centred, eps=1e-5, scale=t[3], amax=t[4])[:2]

    return [
        Case(
            f"norm_float8 bf16, {'LayerNorm' if centred else 'RMSNorm'}, both ways",
            "norm_float8",
            4,
            partial(inputs, bias=centred),
            partial(prepare, centred=centred),
            others={name: partial(unfused_norm, centred=centred)} if found else {},
            shape=(16384, 4096),
            odd_shape=(131, 192),
            wrong_share=2e-3,
        )
        for centred in (False, True)
    ]


def unfused_norm(t: Inputs, centred: bool) -> Step:
    """The same in two steps by Transformer Engine."""
    import transformer_engine.pytorch as te

    x, quantize = t[0], transformer_engine_cast_transpose(t)
    kind = te.LayerNorm if centred else te.RMSNorm
    norm = kind(hidden_size=x.shape[1], eps=1e-5, params_dtype=x.dtype, device=x.device)

    @torch.no_grad()
    def step() -> Any:
        norm(x)
        return quantize()  # of x, which is as large

    return step


def unfused_gradient(t: Inputs) -> Step:
    """The same in two steps."""
    dy, fused, row_scale, packed_scale, row_amax, packed_amax = t
    flag = torch.zeros(1, dtype=torch.int32, device=dy.device)

    def step() -> Any:
        dz = kernels.activation_backward(dy, fused, "swiglu")
        return kernels.grad_pack24(
            dz,
            seed=7,
            row_scale=row_scale,
            row_dtype=E4M3,
            packed_scale=packed_scale,
            row_amax=row_amax,
            packed_amax=packed_amax,
            error_flag=flag,
        )

    return step


def unfused_weight(dtype: torch.dtype) -> Mapping[str, Callable[[Inputs], Step]]:
    """The same by this package's separate kernels."""

    def prepare(t: Inputs) -> Step:
        w, mask, scale, _ = t
        inverse = None if scale is None else scale.reciprocal()
        flag = torch.zeros(1, dtype=torch.int32, device=w.device)
        pack = partial(kernels.pack24, dtype=dtype, scale_inv=inverse, error_flag=flag)

        def step() -> tuple[kernels.Packed24, kernels.Packed24]:
            pruned = torch.where(mask, w, 0)
            return pack(pruned), pack(pruned.t().contiguous())

        return step

    return {"torch where, transpose, pack24 twice": prepare}


def prepare_gradient(
    op: Callable[..., Any], t: Inputs, exact: bool, row_dtype: torch.dtype | None
) -> Step:
    """A step that prepares the gradient `dz`, as a case calls it."""
    dz, row_scale, packed_scale, row_amax, packed_amax = t
    return partial(
        op,
        dz,
        seed=7,
        exact=exact,
        row_dtype=row_dtype,
        packed_scale=packed_scale,
        row_scale=None if row_dtype is None else row_scale,
        row_amax=row_amax,
        packed_amax=packed_amax,
    )
