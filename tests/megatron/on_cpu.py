"""megatron-core's optimizer and schedules on CPU tensors, where they name and expect "cuda"."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class _NoStream:
    """A stream of work that is done already."""

    def wait_event(self, _: object) -> None: ...


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the CPU; there is a stream to ask for."""

    def __enter__(self):
        self._current_stream = torch.cuda.current_stream
        torch.cuda.current_stream = lambda *_: _NoStream()
        return super().__enter__()

    def __exit__(self, *error):
        torch.cuda.current_stream = self._current_stream
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")  # which they compare
        return result
