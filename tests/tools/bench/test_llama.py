"""The benchmarks of `megasparse.nn` run, small and on a CPU; their numbers are not looked at."""

from __future__ import annotations

import pytest

from tools.bench import generate_packed, nn_llama

pytest.importorskip("transformers", reason="transformers is not installed")


def test_training_beside_the_baselines(tmp_path):
    page = tmp_path / "page.md"
    arguments = "--device cpu --size tiny --batch 2 --sequence 64 --steps 1 --warmup 1 --only"
    ways = ["bf16", "fst", "fst fp8"]
    code = nn_llama.main([*arguments.split(), *ways, "--output", str(page)])
    text = page.read_text()
    assert code == 0 and "did not run" not in text
    assert all(f"| {way} " in text for way in ways)


def test_generating_beside_dense(tmp_path):
    page = tmp_path / "page.md"
    arguments = "--device cpu --size tiny --prompt 8 --new-tokens 3 --batches 2 --output"
    assert generate_packed.main([*arguments.split(), str(page)]) == 0
    assert page.read_text().count("| 2:4 ") == 2
