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
    "parallel/test_resume.py",
    "parallel/test_fp8.py",
    "reliability/test_faults.py",
    "train/test_runs.py",
    "docs/test_docs.py",
    "checkpoint/test_compatibility.py",
    "train/engine/test_step_guard.py",
    "launch/test_launcher.py",
    "tools/test_compress_tools.py",
    "tools/test_data_tools.py",
    "parallel/test_consistency.py",
    "kernels/test_weight_pack24.py",
    "distillation/test_runs.py",
    "reliability/test_security.py",
]


def place(path: Path) -> int:
    """Where a file is among the longest; those that are not come after all of them."""
    name = str(path.relative_to(TESTS)) if path.is_relative_to(TESTS) else ""
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)
