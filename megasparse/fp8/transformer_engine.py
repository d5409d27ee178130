"""The door to Transformer Engine: quantizing on a GPU, updates of scales, backward passes of norms.

Without Transformer Engine (CPU) the callers compute the same in plain torch, which is the
definition; `refusal` says why it cannot be used.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from megasparse.extras import advice
from megasparse.kernels.packed24 import E4M3

try:  # not only ImportError: without a GPU, or with a broken cuDNN, it raises others
    import transformer_engine.pytorch  # noqa: F401  (loads the library)
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    _missing: str | None = None
except Exception as error:
    tex = Float8Quantizer = None
    _missing = " ".join(f"{type(error).__name__}: {error}".split())

AmaxAlgorithm = Literal["max", "most_recent"]


def is_there() -> bool:
    """Whether Transformer Engine can be used in this process."""
    return tex is not None


def refusal(device: torch.device) -> str | None:
    """Why FP8 GEMMs cannot run on a device, or None when they can."""
    if device.type != "cuda":
        return f"the run is on {device.type}, expected a GPU"
    if _missing is not None:
        return (
            f"Transformer Engine cannot be imported ({_missing}); it comes with "
            f"{advice('transformer_engine')}"
        )
    if torch.cuda.get_device_capability(device)[0] < 9:
        return f"{torch.cuda.get_device_name(device)} has no FP8 tensor cores, expected Hopper"
    return None


def make_quantizer(
    scale: torch.Tensor, amax: torch.Tensor, columns: bool, dtype: torch.dtype = E4M3
) -> Any:
    """Transformer Engine's quantizer with a scale and a maximum at fixed addresses.

    Args:
        scale: float32 0-d, the multiplier.
        amax: float32 (1,), raised to the largest magnitude that is quantized.
        columns: also the transposed copy.
        dtype: of the copies, e4m3 or e5m2.
    """
    kind = tex.DType.kFloat8E4M3 if dtype == E4M3 else tex.DType.kFloat8E5M2
    return Float8Quantizer(scale.view(1), amax, kind, rowwise=True, columnwise=columns)


def quantize(
    x: torch.Tensor, quantizer: Any, dtype: torch.dtype = E4M3
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (T, K) in 8 bits, row-major (T, K), and transposed (K, T) if the quantizer has columns.

    Args:
        dtype: that the quantizer was made for.
    """
    result = tex.quantize(x.detach().contiguous(), quantizer)
    transposed = result._transpose.view(dtype) if quantizer.columnwise_usage else None
    return result._data.view(dtype), transposed


def transposed(x: torch.Tensor) -> torch.Tensor:
    """x (T, K) of e4m3 as (K, T), row-major; by plain torch where x is not on a GPU."""
    if not x.is_cuda:
        return x.view(torch.uint8).t().contiguous().view(E4M3)
    return tex.fp8_transpose(x.view(torch.uint8), tex.DType.kFloat8E4M3, out=None).view(E4M3)


def raise_amax(x: torch.Tensor, amax: torch.Tensor) -> None:
    """Raise `amax`, float32 (1,), to the largest magnitude of x; nothing waits for the device."""
    tex.compute_amax(x.detach().contiguous(), amax)


def update_delayed(
    newest: torch.Tensor,
    history: torch.Tensor,
    scale: torch.Tensor,
    algorithm: AmaxAlgorithm,
    margin: int,
) -> None:
    """Delayed scaling's update, in one launch; see `delayed.update_by_definition`."""
    tex.fused_amax_and_scale_update_after_reduction(
        newest, [history], [scale], algorithm, tex.DType.kFloat8E4M3, margin
    )


def norm_backward(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of a norm's input, weight and (LayerNorm's) bias, on a GPU.

    Args:
        dy_TH: of the norm's output.
        mean, rstd: of each token, (T,) float32; no mean: RMSNorm.
    """
    dy_TH = dy_TH.contiguous()
    if mean is None:
        return tuple(tex.rmsnorm_bwd(dy_TH, x_TH, rstd, weight, 0, False))
    return tuple(tex.layernorm_bwd(dy_TH, x_TH, mean, rstd, weight, 0, False))
