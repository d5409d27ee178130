"""A profile of some steps on some ranks: a trace by torch, or ranges for nsys, with names.

Phases, layers, the three GEMMs of each linear, the preparation of operands and communication are
ranges. Replayed CUDA graphs run no Python, so the profiled steps run eagerly unless
`--no-profile-eager` is given: then kernels alone have names. The history of a GPU's memory can be
kept beside it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from megasparse.config import ResolvedConfig
from megasparse.log import logger
from megasparse.megatron.parallel_linear import ParallelLinear
from megasparse.timer import named
from megasparse.train.engine.base import Engine

# Set by `nsys profile`, which reads the ranges itself and would be in the way of torch's profiler.
NSYS = "NSYS_PROFILING_SESSION_ID"
MEMORY_ENTRIES = 100_000


class Profiler:
    """The profile of one rank; nothing where the run or the rank asks for none.

    Args:
        config: of the run.
        engine: whose steps are profiled.
    """

    def __init__(self, config: ResolvedConfig, engine: Engine) -> None:
        settings, rank = config.logging, engine.grid.rank
        self._engine, self._rank = engine, rank
        self._first, self._last = settings.profile_step_start + 1, settings.profile_step_end
        mine = str(rank) in settings.profile_ranks
        self._wanted = settings.profile and mine
        self._eager = settings.profile_eager and settings.profile
        self._torch = settings.use_pytorch_profiler or NSYS not in os.environ
        self._folder = Path(config.checkpoint.run_dir) / "profile"
        self._gpu = engine.grid.device.type == "cuda"
        self._memory: Path | None = None
        if settings.record_memory_history and mine:
            name = settings.memory_snapshot_path or self._folder / "memory.pickle"
            self._memory = Path(name).with_suffix(f".rank{rank}.pickle")
            self._record_memory()
        self._open: contextlib.ExitStack | None = None
        self._step = contextlib.ExitStack()
        self._profile: Any = None

    def begin(self, step: int) -> None:
        """Before the step of this number, the first is 1."""
        if step == self._first and self._eager and self._engine.layout.graphs is not None:
            self._engine.layout.graphs.paused = True  # on all ranks: they keep in step
        if step == self._first and self._wanted:
            self._start()
        if self._open is not None:
            self._step = contextlib.ExitStack()
            self._step.enter_context(named(f"step {step}"))

    def end(self, step: int) -> None:
        """After it."""
        if self._open is not None:
            self._step.close()
        if step == self._last:
            self.close()
            self._save_memory()
            if self._engine.layout.graphs is not None:
                self._engine.layout.graphs.paused = False

    @property
    def running(self) -> bool:
        """Whether the step under way is profiled here."""
        return self._open is not None

    def close(self) -> None:
        """Write what was profiled so far."""
        if self._open is None:
            return
        self._open.close()
        self._open = None
        if self._profile is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first}-{self._last}.rank{self._rank}.json.gz"
        self._profile.export_chrome_trace(str(path))
        logger.info("profile: %s (open it at https://ui.perfetto.dev)", path)
        self._profile = None

    def _start(self) -> None:
        self._open = contextlib.ExitStack()
        self._engine.timer.named = True
        self._open.callback(setattr, self._engine.timer, "named", False)
        for name, module in self._engine.model.named_modules():
            if isinstance(module, ParallelLinear):
                module.profiled_as = name
                self._open.callback(setattr, module, "profiled_as", None)
            if _is_part(name):
                self._open.callback(_range_around(module, name))
        if not self._torch:
            if self._gpu:
                torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
                self._open.callback(torch.cuda.profiler.stop)
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()
        self._open.callback(self._profile.stop)

    def _record_memory(self) -> None:
        if not self._gpu:
            logger.warning("--record-memory-history needs a GPU; there is none, so nothing is kept")
            self._memory = None
            return
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_ENTRIES)

    def _save_memory(self) -> None:
        if self._memory is None:
            return
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(self._memory))
        torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("memory: %s (open it at https://pytorch.org/memory_viz)", self._memory)
        self._memory = None


def _is_part(name: str) -> bool:
    """Whether a module's forward pass is a range: layers, and their attention and FFN."""
    words = name.split(".")
    layer = len(words) >= 2 and words[-2] == "layers" and words[-1].isdigit()
    return layer or words[-1] in ("self_attention", "mlp")


def _range_around(module: torch.nn.Module, name: str) -> Any:
    """Put a module's forward pass in a range; returns what undoes it."""
    opened: list[Any] = []

    def before(*_: Any) -> None:
        opened.append(named(name))
        opened[-1].__enter__()

    def after(*_: Any) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(before)]
    handles.append(module.register_forward_hook(after, always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
