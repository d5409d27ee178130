"""Recording passes as CUDA graphs: the streams, the memory and the rules of a capture."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from megasparse.errors import KernelError
from megasparse.kernels.spmm24.binding import reserve_workspace
from megasparse.log import warn_once

Tensors = tuple[Any, ...]


class Recorder(Protocol):
    """Records functions of no arguments, to be replayed on the same memory.

    Attributes:
        device: of the tensors.
    """

    device: torch.device

    def new_pool(self) -> Any:
        """Memory for what is recorded together and replayed in that order."""
        ...

    def prepared(self) -> contextlib.AbstractContextManager[None]:
        """A context to record in."""
        ...

    def record(self, body: Callable[[], Tensors], pool: Any) -> tuple[Tensors, Callable[[], None]]:
        """What the body returns, in places that stay, and what fills them again.

        Args:
            body: whose kernels are recorded; they do not run now.
        """
        ...

    def leaving_generator(self, replay: Callable[[], None]) -> Callable[[], None]:
        """A replay that leaves the device's generator as it was: of a pass that is computed again,
        as attention counts as drawing even where nothing is dropped."""
        ...


class CudaRecorder:
    """CUDA graphs of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # A stream of its own: library workspaces that its products were captured with stay with it.
        self._stream = torch.cuda.Stream(device)

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Memory is tidy, and nothing collects garbage, which could free memory of a graph."""
        reserve_workspace(self._stream)
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        collecting = gc.isenabled()
        gc.disable()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if collecting:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, body: Callable[[], Tensors], pool: Any) -> tuple[Tensors, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (of the data loader, of saves) go on using the device meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs = body()
        finally:
            graph.capture_end()
        return outputs, graph.replay

    def leaving_generator(self, replay: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            generator = torch.cuda.default_generators[torch.cuda.current_device()]

        def run() -> None:
            offset = generator.get_offset()
            replay()
            generator.set_offset(offset)

        return run


class Replayed:
    """One function without arguments or results, recorded at its second call.

    Where that fails, for want of memory for instance, it goes on running as it is.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self._run, self._calls = run, 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, recorder: Recorder) -> None:
        """Run it."""
        self._calls += 1
        if self._calls == 1:
            self._run()
            return
        if self._replay is None:
            try:
                with recorder.prepared():
                    _, self._replay = recorder.record(self._body, recorder.new_pool())
            except (RuntimeError, KernelError) as error:
                warn_once("not captured in a CUDA graph: %s", str(error).partition("\n")[0])
                self._replay = self._run
        self._replay()

    def _body(self) -> Tensors:
        self._run()
        return ()
