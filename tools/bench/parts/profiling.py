"""Where the time of a GPU goes: kernels of a profile by class."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from megasparse.cli import markdown_table

# The first pattern that is found in a kernel's name is its class.
CLASSES = {
    "communication": r"nccl",
    "attention": r"flash|fmha|sdpa|attention|cudnn_generated",
    "rotary embedding": r"rope|rotary",
    "cross entropy": r"cross_entropy",
    "2:4 GEMM": r"spmma|sparse|cusparselt|sp_gemm",
    "preparing operands": r"mvue|pack|transposable|prune24|threshold|quanti[sz]e|masked_decay|flip",
    "dense GEMM": r"gemm|nvjet|cutlass|cublas|s884|s16816|xmma",
    "casts and amax of FP8": r"rescale|(?<!no)cast|amax|fp8|transpose|scale_kernel|scales_kernel",
    "norm": r"norm",
    "tokens of experts": r"expert|gather_rows|sum_rows|gather_float8",
    "gated activation": r"swiglu|geglu|gated|weighted|activation_float8",
    "optimizer": r"adam|multi_tensor|foreach",
    "copies and fills": r"memcpy|memset|copy|fill|cat",
    "elementwise and reductions": r"elementwise|reduce|vectorized|index|embedding",
}


@dataclass
class Profile:
    """Figures of one step.

    Attributes:
        seconds: of the host's clock, without the profiler.
        device_seconds: kernels' times added up, by class.
        launches: kernels, by class.
        longest: (seconds, launches, name) of kernels, the longest together first.
        computing: during which any kernel but communication ran.
        covered: during which any kernel ran. Unlike sums of kernels' times these two count once
            what runs side by side on several streams.
    """

    seconds: float = 0.0
    device_seconds: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    longest: list[tuple[float, int, str]] = field(default_factory=list)
    computing: float = 0.0
    covered: float = 0.0

    def scale(self, share: float) -> None:
        """Make kernels' times (not launches) those of a part of what was profiled."""
        self.device_seconds = {k: share * v for k, v in self.device_seconds.items()}
        self.longest = [(share * s, n, name) for s, n, name in self.longest]

    @property
    def busy(self) -> float:
        """Seconds of all kernels."""
        return sum(self.device_seconds.values())


def kernel_class(name: str) -> str:
    """The class of a kernel's name."""
    for label, pattern in CLASSES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return label
    return "other"


def length_of_union(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the line (start, end) spans cover together, each place counted once."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def profiled(step: Callable[[], object], steps: int) -> Profile:
    """Kernel times of `steps` calls of `step`, a call's share of each."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    names: dict[str, tuple[float, int]] = {}
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in trace.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        duration = event.time_range.elapsed_us() / 1e6 / steps
        label = kernel_class(event.name)
        seconds[label] += duration
        launches[label] += 1
        spans[label == "communication"].append((event.time_range.start, event.time_range.end))
        before = names.get(event.name, (0.0, 0))
        names[event.name] = (before[0] + duration, before[1] + 1)
    longest = sorted(((s, n // steps, name) for name, (s, n) in names.items()), reverse=True)
    by_class = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return Profile(
        device_seconds=by_class,
        launches={k: v // steps for k, v in launches.items()},
        longest=longest,
        computing=length_of_union(spans[False]) / 1e6 / steps,
        covered=length_of_union([*spans[False], *spans[True]]) / 1e6 / steps,
    )


def table(profiles: dict[str, Profile]) -> list[str]:
    """Markdown: milliseconds (and launches) a step of every class, a column for each profile."""
    labels = [
        c for c in [*CLASSES, "other"] if any(c in p.device_seconds for p in profiles.values())
    ]
    rows = []
    for label in labels:
        cells = [
            f"{1e3 * p.device_seconds[label]:.2f} ({p.launches[label]})"
            if label in p.device_seconds
            else "-"
            for p in profiles.values()
        ]
        rows.append([label, *cells])
    sums = {
        "all kernels": lambda p: f"{1e3 * p.busy:.2f} ({sum(p.launches.values())})",
        "step, without the profiler": lambda p: f"{1e3 * p.seconds:.2f}",
    }
    rows += [[label, *(text(p) for p in profiles.values())] for label, text in sums.items()]
    return markdown_table(["ms (launches)", *profiles], rows)
