"""The kernel benchmark checks before it measures, and refuses a speed to a kernel that is wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megasparse import kernels
from tools.bench import kernels as bench


def off_by_one_entry(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrong in one entry, on the Triton backend only."""

    def wrong(
        w: torch.Tensor, *, backend: str | None = None, nan_flag: torch.Tensor | None = None
    ) -> torch.Tensor:
        mask = right(w, backend=backend, nan_flag=nan_flag)
        if backend == "triton":
            mask[-1, -1] = ~mask[-1, -1]
        return mask

    return wrong


def test_all_kernels_agree_at_their_odd_shapes(capsys) -> None:
    assert bench.main(["--check-only", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    names = [case.name for case in bench.all_cases() if hasattr(kernels, case.op)]
    assert len(names) >= 12
    for name in names:
        assert f"| {name} |" in out


def test_a_wrong_kernel_fails_without_a_speed(monkeypatch, capsys) -> None:
    measured = []

    def measure(case: object, *args: object) -> dict[str, str]:
        measured.append(case.name)
        return {"ms": "1.000"}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(kernels, "prune24_mask", off_by_one_entry(kernels.prune24_mask))
    small = [
        bench.Case(f"{op} case", op, 3, lambda source: (source.normal(),), shape=(8, 16))
        for op in ("prune24_mask", "soft_threshold24")
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, failed = bench.run(small, device, seed=3, copy=1.0)
    assert failed == 1
    assert measured == ["soft_threshold24 case"]
    assert "FAILED" in rows[2] and "1 differences" in rows[2] and "1.000" not in rows[2]
    assert "1.000" in rows[3] and "516 x 1036, 8 x 16" in rows[3]


def test_exit_code_of_a_wrong_kernel(monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels, "prune24_mask", off_by_one_entry(kernels.prune24_mask))
    assert bench.main(["--check-only", "--only", "prune24_mask bf16"]) == 1
    assert "FAILED: 1 of 1" in capsys.readouterr().out


def test_unknown_names_and_missing_gpu(monkeypatch, capsys) -> None:
    assert bench.main(["--check-only", "--only", "no such kernel"]) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_the_report_names_its_seed_and_no_absolute_path(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for output, shown in (("/some/where/table.md", "table.md"), ("out/table.md", "out/table.md")):
        options = bench.parse(["--only", "a b", "--output", output, "--seed", "12"])
        text = bench.report(["| a |"], 4000.0, options)
        command = f"-m tools.bench.kernels --only 'a b' --output {shown} --seed 12"
        assert f"`python {command}`" in text and "seed 12." in text
    first, second = (bench.parse([]) for _ in range(2))
    assert first.seed != second.seed
    assert f"--seed {first.seed}" in bench.command(first)
