"""The sweep times every candidate of a kernel, puts back what was set, and times no wrong one."""

from __future__ import annotations

import importlib

import pytest
import torch

from tools.bench import launch_parameters as tool


def test_each_sweep_names_a_row_and_valid_parameters():
    names = [case.name for case in tool.operand_cases()]
    for sweep in tool.SWEEPS:
        assert sum(name.startswith(sweep.case) for name in names) == 1
        module = importlib.import_module(f"megasparse.kernels.{sweep.module}.triton")
        set_now = getattr(module, sweep.name)
        assert set_now in [type(set_now)(*values) for values in sweep.candidates]


@pytest.mark.parametrize("broken", [False, True])
def test_candidates_are_set_and_checked(monkeypatch, broken):
    sweep = next(s for s in tool.SWEEPS if s.module == "activation_float8")
    module = importlib.import_module("megasparse.kernels.activation_float8.triton")
    before, timed, checked = module.LAUNCH, [], []

    def results(case, device):
        checked.append(module.LAUNCH)
        wrong = broken and module.LAUNCH.groups == 8
        return [torch.tensor([int(wrong)], dtype=torch.uint8)]

    class Small:
        name, op, shape = "activation_float8", "activation_float8", (4, 64)
        inputs = staticmethod(lambda source: ())
        prepare = staticmethod(lambda op, inputs: lambda: None)

    monkeypatch.setattr(tool, "results", results)
    monkeypatch.setattr(tool, "milliseconds", lambda _: timed.append(module.LAUNCH) or 1.5)
    lines, wrong = tool.rows(sweep, Small, torch.device("cpu"))
    assert [(c.groups, c.num_warps) for c in checked[1:]] == list(sweep.candidates)
    assert wrong == broken and len(timed) == len(sweep.candidates) - broken
    assert before == module.LAUNCH and sum("(set now) | 1.500" in line for line in lines) == 1
    assert sum("another result" in line for line in lines) == broken


def test_without_a_gpu_or_a_sweep_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main([]) == 2 and "no CUDA device" in capsys.readouterr().err
    assert tool.main(["--only", "nothing"]) == 2 and "'nothing'" in capsys.readouterr().err
