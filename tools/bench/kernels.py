"""Measure the kernels of `megasparse.kernels` on a GPU, after checking them.

Every kernel is first compared with its reference on fresh random data, at a moderate odd shape and
at the measured shape where memory allows. One that disagrees gets no speed: its row says FAILED and
the exit code is 1. Times are medians of `triton.testing.do_bench`; bytes are those the operation
must read and write once (pack24 that finds its scale: the weight twice); bandwidth is compared with
a device copy measured in the same run.

    python -m tools.bench.kernels
    python -m tools.bench.kernels --only transposable24_mask --only mvue24
    python -m tools.bench.kernels --output tools/results/kernels-h200.md
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing

from megasparse import kernels
from megasparse.atomic_files import write_text
from megasparse.cli import markdown_table
from tools.bench.parts.kernel_cases import Case, Inputs, Source, Step, single_cases
from tools.bench.parts.operand_cases import operand_cases

COLUMNS = ("kernel", "shape", "MB", "ms", "GB/s", "of copy", "checked at", "what else exists")


def all_cases() -> list[Case]:
    """All rows of the table."""
    return [*single_cases(), *operand_cases()]


def bind(op: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The public function with its backend; flags instead of synchronising checks."""
    function = getattr(kernels, op)
    flags = {name for name in inspect.signature(function).parameters if name.endswith("_flag")}
    keywords = {name: torch.zeros(1, dtype=torch.int32, device=device) for name in flags}
    return partial(function, backend=backend, **keywords)


def tensors_of(result: Any) -> list[torch.Tensor]:
    """All tensors in what a kernel returns."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in tensors_of(part)]
    if result is None:
        return []
    return [result.values, result.metadata, result.scale]  # Packed24


def disagreement(case: Case, inputs: Inputs, device: torch.device) -> str | None:
    """How Triton's result differs from the reference's, or None. `inputs` are not changed."""
    results = []
    for backend in ("triton", "reference"):
        own = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)
        results.append(tensors_of(case.prepare(bind(case.op, backend, device), own)()))
    for actual, expected in zip(*results, strict=True):
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return (
                f"{actual.dtype} of shape {tuple(actual.shape)}, "
                f"expected {expected.dtype} of shape {tuple(expected.shape)}"
            )
        if case.rtol or case.atol:
            close = torch.isclose(actual, expected, rtol=case.rtol, atol=case.atol)
            wrong = int((~close).sum())
        else:
            pair = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (actual, expected)]
            wrong = int((pair[0] != pair[1]).sum())
        if wrong > case.wrong_share * actual.numel():
            return f"{wrong} differences from the reference in {actual.numel()} entries"
    return None


def verify(case: Case, device: torch.device, seed: int, shapes: list[tuple[int, int]]) -> str:
    """The shapes at which the kernel agrees with its reference; ValueError when it does not.

    A shape whose check does not fit in memory is left out of the answer.
    """
    checked = []
    for shape in shapes:
        source = Source(shape, device, torch.Generator(device).manual_seed(seed))
        try:
            wrong = disagreement(case, case.inputs(source), device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        if wrong is not None:
            raise ValueError(f"{shape[0]} x {shape[1]}: {wrong}")
        checked.append(f"{shape[0]} x {shape[1]}")
    if not checked:
        raise ValueError("no shape fits in memory")
    return ", ".join(checked)


def milliseconds(step: Step) -> float:
    """The median time of a call."""
    return triton.testing.do_bench(step, return_mode="median")


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read and written, of a device copy of 1 GiB."""
    source = torch.ones(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def measure(case: Case, device: torch.device, seed: int, copy: float) -> dict[str, str]:
    """The cells of a row that are about speed."""
    source = Source(case.shape, device, torch.Generator(device).manual_seed(seed))
    inputs = case.inputs(source)
    size = case.bytes_per_entry * case.shape[0] * case.shape[1]
    time = milliseconds(case.prepare(bind(case.op, "triton", device), inputs))
    rate = size / time / 1e6
    others = []
    for name, prepare in case.others.items():
        try:
            other = milliseconds(prepare(inputs))
            others.append(f"{name} {other:.3f} ms ({other / time:.1f}x)")
        except RuntimeError as error:  # not supported, or out of memory
            others.append(f"{name}: {type(error).__name__} {str(error).splitlines()[0][:60]}")
    return {
        "shape": f"{case.shape[0]} x {case.shape[1]}",
        "MB": f"{size / 1e6:.0f}",
        "ms": f"{time:.3f}",
        "GB/s": f"{rate:.0f}",
        "of copy": f"{100 * rate / copy:.0f} %",
        "what else exists": "; ".join(others) or "-",
    }


def run(
    cases: list[Case], device: torch.device, seed: int, copy: float | None
) -> tuple[list[str], int]:
    """Check, and unless `copy` (GB/s) is None measure, every case: table rows and failures."""
    rows, failed = markdown_table(COLUMNS, [], text_columns=len(COLUMNS)), 0
    for case in cases:
        shapes = [case.odd_shape] if copy is None else [case.odd_shape, case.shape]
        cells = {"kernel": case.name}
        try:
            cells["checked at"] = verify(case, device, seed, shapes)
        except Exception as error:  # whatever a kernel throws is that kernel's failure
            failed += 1
            cells["shape"] = f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
        else:
            if copy is not None:
                cells |= measure(case, device, seed, copy)
        rows.append(_row(cells))
        print(rows[-1], flush=True)
    return rows, failed


def _row(cells: dict[str, str]) -> str:
    return "| " + " | ".join(cells.get(column, "") for column in COLUMNS) + " |"


def command(options: argparse.Namespace) -> str:
    """What repeats the run: relative paths as given, of absolute ones only the file's name."""
    words = ["-m", "tools.bench.kernels"]
    words += [word for name in options.only or [] for word in ("--only", name)]
    if options.output:
        output = options.output
        words += ["--output", str(output.name if output.is_absolute() else output)]
    return shlex.join(["python", *words, "--seed", str(options.seed)])


def report(rows: list[str], copy: float, options: argparse.Namespace) -> str:
    """The markdown document: where, when, with what, and the table."""
    head = [
        f"# Kernels on {torch.cuda.get_device_name()}, {datetime.date.today().isoformat()}",
        "",
        f"torch {torch.__version__}, triton {triton.__version__}; device copy {copy:.0f} GB/s; "
        f"seed {options.seed}.",
        f"Command: `{command(options)}`",
        "",
    ]
    return "\n".join([*head, *rows, ""])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="rows whose name contains NAME; repeatable"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument(
        "--check-only",
        action="store_true",
        help="compare with the references at the odd shapes, without speeds "
        "(on a machine without a GPU set TRITON_INTERPRET=1)",
    )
    seed = int.from_bytes(os.urandom(4), "little")
    parser.add_argument("--seed", type=int, default=seed, help="of the data; random by default")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not (options.check_only or torch.cuda.is_available()):
        print("kernels.py: no CUDA device; --check-only runs without one")
        return 2
    wanted = [
        case
        for case in all_cases()
        if not options.only or any(part in case.name for part in options.only)
    ]
    cases = [case for case in wanted if hasattr(kernels, case.op)]
    missing = sorted({case.op for case in wanted} - {case.op for case in cases})
    if missing:
        print("not in megasparse.kernels:", ", ".join(missing))
    if not cases:
        print("kernels.py: nothing to run for", *(options.only or ["all"]))
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"seed {options.seed}")
    copy = None if options.check_only else copy_bandwidth(device)
    rows, failed = run(cases, device, options.seed, copy)
    if options.output and copy is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, report(rows, copy, options))
    if failed:
        print(f"FAILED: {failed} of {len(cases)} kernels")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
