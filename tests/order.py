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
    "train/test_runs.py",
    "parallel/test_resume.py",
    "checkpoint/test_compatibility.py",
    "reliability/test_faults.py",
    "megatron/graphs/test_layer_graphs.py",
    "parallel/test_fp8.py",
    "train/engine/test_step_guard.py",
    "launch/test_launcher.py",
    "distillation/test_runs.py",
    "distillation/test_slorb_runs.py",
    "tools/experiments/test_compare_ast.py",
    "train/engine/test_skipped_steps.py",
    "parallel/test_families.py",
    "train/test_resume.py",
    "train/test_activations.py",
    "parallel/test_consistency.py",
    "tools/experiments/test_compare_recipes.py",
    "distillation/test_wanda_runs.py",
    "launch/test_inference.py",
    "tools/test_data_tools.py",
    "train/test_phases.py",
    "docs/test_docs.py",
    "convert/test_families.py",
    "inference/test_eval_harness.py",
    "megatron/test_standalone.py",
    "tools/bench/test_ranks.py",
    "convert/test_torch_dist.py",
    "convert/test_torch_dist_optimizer.py",
    "tools/test_search_decay.py",
    "tools/bench/test_kernels.py",
    "tools/bench/test_scaling.py",
    "kernels/test_weight_pack24.py",
    "launch/test_nodes.py",
    "convert/test_export.py",
]


def place(path: Path) -> int:
    """Where a file is among the longest; those that are not come after all of them."""
    name = str(path.relative_to(TESTS)) if path.is_relative_to(TESTS) else ""
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)
