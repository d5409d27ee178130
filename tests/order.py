"""The order of the suite's files: the longest first.

Whole files are given to the workers of `pytest -n`. The long ones start before all others, so that
no worker is left with one of them when the rest is done.
"""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
# By their time on two cores. The real Slurm mostly waits, beside ranks that do not.
LONGEST = [
    "parallel/test_matrix.py",
    "launch/test_slurm.py",
    "parallel/test_details.py",
    "tools/experiments/test_compare_ast.py",
    "parallel/test_resume.py",
    "reliability/test_faults.py",
    "parallel/test_fp8.py",
    "checkpoint/test_compatibility.py",
    "tools/experiments/test_compare_recipes.py",
    "train/test_runs.py",
    "train/engine/test_step_guard.py",
    "docs/test_docs.py",
    "launch/test_launcher.py",
    "tools/bench/test_kernels.py",
    "tools/test_search_decay.py",
    "distillation/test_runs.py",
    "parallel/test_consistency.py",
    "kernels/test_weight_pack24.py",
    "tools/bench/test_scaling.py",
    "tools/test_data_tools.py",
    "launch/test_nodes.py",
    "convert/test_export.py",
]


def place(path: Path) -> int:
    """Where a file is among the longest; those that are not come after all of them."""
    name = str(path.relative_to(TESTS)) if path.is_relative_to(TESTS) else ""
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)
