"""The estimator: known sizes, layouts that fit, and what was measured on GPUs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "tools/results/scaling-h200x2-partial-2026-11-22.md"
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
FLAGS = {"one": [], "tp 2, sp": TP2, "pp 2": PP2, "dp 2": []}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    import estimate

    yield estimate
    sys.path.remove(str(ROOT / "tools"))
    for name in ("estimate", "estimate_time", "bench_scaling"):
        sys.modules.pop(name, None)


def test_llama_3_8b_has_its_published_size(tool, capsys):
    assert tool.main([str(ROOT / "configs/llama_8b_fst.yaml"), "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "8,030,261,248" in text  # of the published checkpoint
    assert "dp 2" in text and "step time" in text and " fits 139 GiB" in text


def test_search_lists_only_what_fits_and_says_when_nothing_does(tool, capsys):
    config = str(ROOT / "configs/llama_8b_fst.yaml")
    assert tool.main([config, "--gpus", "8", "--search", "--gpu-memory", "40", "--top", "99"]) == 0
    text = capsys.readouterr().out
    sizes = [float(size) for size in re.findall(r"^ +([\d.]+) GiB", text, re.M)]
    fitting, tried = map(int, re.match(r"(\d+) of (\d+) layouts fit", text).groups())
    assert 0 < fitting < tried and len(sizes) == fitting and max(sizes) <= 40
    seconds = [float(s) for s in re.findall(r"([\d.]+) s  ", text)]
    assert seconds == sorted(seconds) and len(seconds) == fitting
    assert tool.main([config, "--gpus", "1", "--search", "--gpu-memory", "40"]) == 1
    assert "0 of" in (text := capsys.readouterr().out) and "the smallest takes" in text


def test_a_bad_configuration_is_one_line(tool, capsys):
    config = str(ROOT / "configs/llama_8b.yaml")
    assert tool.main([config, "--gpus", "6"]) == 64
    assert capsys.readouterr().err.startswith("ConfigError: world size 6 is not divisible")


def _rows() -> list[tuple[str, int, str, float, float]]:
    """layout, GPUs, recipe, tokens a second, GiB of the committed measurements."""
    cells = [line.strip("| \n").split(" | ") for line in MEASURED.read_text().splitlines()]
    return [
        (c[0], int(c[1]), c[2], float(c[3].replace(",", "")), float(c[5]))
        for c in cells
        if c[0] in FLAGS
    ]


@pytest.mark.parametrize("row", _rows(), ids=lambda row: f"{row[0]} {row[2]}")
def test_against_what_was_measured_on_h200(tool, row):
    import bench_scaling

    layout, gpus, recipe, tokens_per_second, gib = row
    flags = [*bench_scaling.MODELS["scaling"], "--bf16", "--mock-data", "--sparsity-recipe", recipe]
    args, _ = tool.parse(["x", "--gpus", str(gpus)])
    config = tool.resolve(tool.load_config([*flags, *FLAGS[layout]]), gpus)
    found = tool.estimate(config, gpus, tool.GemmTable(), args)
    assert found.stages[0].peak_bytes / tool.GIB == pytest.approx(gib, rel=0.05)
    # Small layers are slower than their GEMMs: launches, and shapes below the table's.
    assert tool._rate(found) == pytest.approx(tokens_per_second, rel=0.4)
