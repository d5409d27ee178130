"""Which GEMM computes a shape: the fastest of cuSPARSELt's algorithms, or a dense one.

The library's algorithms differ by tens of percent, its own search does not find the best one, and
some have returned wrong numbers. So each is measured once per shape on the GPU at hand, after its
result has been compared with the dense GEMM's; the choice is kept on disk per GPU and library
version. Where dense is faster, dense is used, and the log says so once per shape.

With `--deterministic-mode` nothing is timed, as noise must not decide how a product is summed: the
first algorithm that is right is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megasparse.atomic_files import write_json
from megasparse.errors import KernelError
from megasparse.input_files import read_regular
from megasparse.log import is_logging_rank, log_once, logger
from megasparse.progress import progress

MAX_ALGORITHMS = 64
# Smaller products take microseconds: a search would find noise.
MIN_FLOPS = 2**31
# Relative error of two 16-bit roundings of the same product; a wrong algorithm is far above it.
MAX_ERROR = 1e-2
FINALISTS = 4
# At least those of today's GPUs, and the longest time that one is made to wait.
_CYCLES_PER_SECOND, _LONGEST_WAIT = 2e9, 0.1


@dataclass(frozen=True)
class Choice:
    """The outcome for one shape: algorithm, and the two times that decided, in milliseconds."""

    algorithm: int
    sparse_ms: float
    dense_ms: float
    rejected: int = 0

    @property
    def dense_wins(self) -> bool:
        return self.dense_ms < self.sparse_ms

    @classmethod
    def untuned(cls) -> Choice:
        """The library's first algorithm, unmeasured."""
        return cls(algorithm=0, sparse_ms=0.0, dense_ms=0.0)


class GemmChooser:
    """Choices by key, in memory and on disk.

    Args:
        path: JSON file; None keeps choices in memory alone. Not used in deterministic mode.
    """

    def __init__(self, path: Path | None) -> None:
        self._timed = not torch.are_deterministic_algorithms_enabled()
        self._path = path if self._timed else None
        self._choices: dict[str, Choice] = _read(self._path)

    def choose(
        self,
        key: str,
        flops: int,
        sparse: Callable[[int], torch.Tensor],
        dense: Callable[[], torch.Tensor],
        least: int = MIN_FLOPS,
    ) -> Choice:
        """The choice for `key`, measured at its first use.

        Args:
            key: operation, sizes and dtype.
            flops: of the dense product.
            sparse: the product by an algorithm of the library; raises for one that does not exist.
            dense: the same product by a dense GEMM.
            least: products with fewer FLOPs are not measured.
        """
        if key in self._choices:
            return self._choices[key]
        small = flops < least
        if not small and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise KernelError(f"{key}: no GEMM was chosen before the step was captured")
        choice = Choice.untuned() if small else self._measure(key, sparse, dense)
        self._choices[key] = choice
        if not small:
            self._write()
        return choice

    def _measure(
        self, key: str, sparse: Callable[[int], torch.Tensor], dense: Callable[[], torch.Tensor]
    ) -> Choice:
        expected = dense()
        times: dict[int, float] = {}
        rejected = 0
        algorithms = range(MAX_ALGORITHMS)
        for algorithm in progress(
            algorithms, desc=f"tuning {key}", unit="algorithm", enabled=is_logging_rank()
        ):
            try:
                result = sparse(algorithm)
            except RuntimeError:
                continue
            error = (result.float() - expected.float()).norm() / expected.float().norm()
            if not float(error) < MAX_ERROR:
                rejected += 1
                continue
            if not self._timed:
                return Choice(algorithm, 0.0, 0.0, rejected)
            times[algorithm] = milliseconds(lambda a=algorithm: sparse(a), 2)  # type: ignore[misc]
        if not times:
            logger.warning("%s: no algorithm of cuSPARSELt gives the dense result", key)
            return Choice(0, float("inf"), 0.0, rejected)
        finalists = sorted(times, key=lambda a: times[a])[:FINALISTS]
        for algorithm in finalists:
            times[algorithm] = milliseconds(lambda a=algorithm: sparse(a), 9)  # type: ignore[misc]
        best = min(finalists, key=lambda a: times[a])
        choice = Choice(best, times[best], milliseconds(dense, 9), rejected)
        log_once(
            "%s: %s (2:4 %.3f ms by algorithm %d, dense %.3f ms)",
            key,
            "dense is used" if choice.dense_wins else "2:4 is used",
            choice.sparse_ms,
            best,
            choice.dense_ms,
        )
        return choice

    def _write(self) -> None:
        """Keep the choices; a cache that cannot be written is no reason to stop."""
        if self._path is None:
            return
        try:
            values = {key: dataclasses.asdict(choice) for key, choice in self._choices.items()}
            write_json(self._path, values, indent=1)
        except OSError as error:
            log_once("GEMM choices are not kept: %s", error)


@functools.cache
def shared_chooser(device: torch.device) -> GemmChooser:
    """The chooser of a GPU, one a process, with its file under the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu = torch.cuda.get_device_name(device).replace(" ", "-")
    library = torch.backends.cusparselt.version()
    name = f"gemms-{gpu}-torch{torch.__version__}-cusparselt{library}.json"
    return GemmChooser(home / "megasparse" / name)


def _read(path: Path | None) -> dict[str, Choice]:
    if path is None:
        return {}
    try:
        values = json.loads(read_regular(path))
        return {key: Choice(**value) for key, value in values.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Time of a product on the device alone, back to back, as in a captured step.

    The device waits until the host has sent all: a small product takes the host longer than the
    device, and its algorithms would differ by the host's noise.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    torch.cuda._sleep(int(_CYCLES_PER_SECOND * min(2 * repeats * host, _LONGEST_WAIT)))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats
