"""Family x recipe x layout, as data: tiny runs of every family, each with a recipe and layouts.

The numbers of a layout are those of the single process, over a stop and an exact resume too.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests import dist
from tests.parallel.layouts import BASE, FULL, PP2, SP, TP2, zero
from tests.parallel.trace import traced
from tests.runs import LLAMA

STEPS = 4
_BASE = [
    *BASE, "--global-batch-size", "4", "--train-iters", str(STEPS), "--eval-interval", str(STEPS),
    "--ffn-hidden-size", "64", "--mask-update-interval", "2",
]  # fmt: skip
_ROPE = [*LLAMA, "--ffn-hidden-size", "64"]
_GPT = ["--num-query-groups", "4"]
ATTENTION = ["--sparse-layers", "*.mlp.*", "*.self_attention.linear_*"]

# As the families of megasparse/convert/huggingface/families.py have them, in few layers.
FAMILIES = {
    "mistral": [*_ROPE, "--window-size", "3,0"],
    "qwen2": [*_ROPE, "--add-qkv-bias", "--window-size", "3,0", "--window-attn-skip-freq", "2"],
    "qwen3": [*_ROPE, "--qk-layernorm", "--kv-channels", "16"],
    "olmo2": [
        *_ROPE, "--qk-layernorm", "--qk-layernorm-scope", "all", "--norm-placement", "post",
    ],
    "smollm3": [*_ROPE, "--no-rope-freq", "[0,1]*2"],
    "phi3": [*_ROPE, "--window-size", "7,0", "--rotary-percent", "0.5"],
    "neox": [
        *_GPT, "--position-embedding-type", "rope", "--rotary-percent", "0.25", "--exact-gelu",
        "--parallel-residual", "--untie-embeddings-and-output-weights",
    ],
    "opt": [*_GPT, "--relu"],
    "sandwich": [*_ROPE, "--norm-placement", "both", "--qk-layernorm"],
}  # fmt: skip
RECIPES = {
    "dense": [
        "--sparsity-recipe", "dense", "--masked-decay", "none", "--mask-update-interval", "none",
        "--dense-tail-fraction", "none",
    ],
    "ste": ["--sparsity-recipe", "ste", "--masked-decay", "none"],
    "sr_ste": ["--sparsity-recipe", "sr_ste"],
    "fst": ["--sparsity-recipe", "fst"],
    "s_ste": ["--sparsity-recipe", "s_ste", "--masked-decay", "none"],
    "ast": ["--sparsity-recipe", "ast", "--masked-decay-ramp-iters", "2"],
    "fst fp8": [
        "--sparsity-recipe", "fst", "--bf16", "--fp8-format", "e4m3",
        "--hidden-size", "128", "--ffn-hidden-size", "128", "--kv-channels", "32",
    ],
}  # fmt: skip
TWO = ["--num-layers", "2"]
# Every layout of a family as (ranks, flags); FP8 is compared with itself, stopped and resumed.
TP = (2, [*TP2, *SP, *zero(1)])
TP_RECOMPUTED = (2, [*TP2, *FULL])
PP = (2, [*PP2, *zero(1)])
CASES = {
    ("mistral", "fst"): [TP],
    ("qwen2", "s_ste"): [PP],
    # Norms that heads share: without sequence parallelism nothing else sums their gradients.
    ("qwen3", "fst"): [(2, [*TP2, *zero(3)])],
    ("qwen3", "fst fp8"): [(1, zero(1))],
    ("olmo2", "sr_ste"): [TP],
    ("smollm3", "ast"): [PP],
    ("phi3", "ste"): [TP_RECOMPUTED],
    ("neox", "fst"): [TP],
    ("opt", "ast"): [TP],
    ("sandwich", "dense"): [PP],
}


def _all(rank: int, world: int, runs: list[list[list[str]]]) -> list[list[dict[str, Any]]]:
    """The rows of each run, which is made in one start or in several."""
    return [[row for flags in parts for row in traced(rank, world, flags)] for parts in runs]


def _flags(tmp: Any, dataset: str, case: tuple[str, str], layout: int) -> list[str]:
    family, recipe = case
    name = f"{family}-{recipe}-{layout}".replace(" ", "-")
    flags = [*_BASE, *FAMILIES[family], *RECIPES[recipe], "--data-path", dataset]
    shallow = [] if any(PP2[0] in flags for _, flags in CASES[case]) else TWO
    return [*flags, *shallow, *ATTENTION, "--run-dir", str(tmp / name)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory, dataset) -> dict[Any, list[dict[str, Any]]]:
    """Rows by case and layout; layout -1 is the single process, never stopped."""
    tmp = tmp_path_factory.mktemp("families")
    wanted: dict[int, dict[Any, list[list[str]]]] = {1: {}, 2: {}}
    for case, layouts in CASES.items():
        # FP8 needs ZeRO's masters.
        alone = [*_flags(tmp, dataset, case, -1), *(zero(1) if "fp8" in case[1] else [])]
        wanted[1][case, -1] = [alone]
        for number, (ranks, flags) in enumerate(layouts):
            run = [*_flags(tmp, dataset, case, number), *flags]
            # Step 3 is no step of mask refreshes: the stored masks are those of the next steps.
            wanted[ranks][case, number] = [[*run, "--exit-interval", "3"], [*run, "--resume"]]
    found: dict[Any, list[dict[str, Any]]] = {}
    for ranks, runs in wanted.items():
        results = dist.run(_all, ranks, list(runs.values()))[0]
        found.update(zip(runs, results, strict=True))
    return found


CHECKED = [(case, number) for case, layouts in CASES.items() for number in range(len(layouts))]


@pytest.mark.parametrize(("case", "number"), CHECKED, ids=[f"{c}, {n}" for c, n in CHECKED])
def test_a_family_trains_alike_in_every_layout_and_resumes_exactly(rows, case, number):
    single, found = rows[case, -1], rows[case, number]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    exact = CASES[case][number][0] == 1
    for row, one in zip(found, single, strict=True):
        step = one["step"]
        assert row["samples"] == one["samples"], f"step {step}"
        assert row["masks"] == one["masks"], f"step {step}"
        assert row["loss"] == pytest.approx(one["loss"], rel=0 if exact else 2e-6), f"step {step}"
        assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=0 if exact else 1e-4)
        assert one["grad_norm"] > 0.1
    assert bool(single[0]["masks"]) == (case[1] not in ("dense",))


def test_families_are_different_models(rows):
    """Each setting does something: no two have the same first loss."""
    first = {case[0]: found[0]["loss"] for (case, number), found in rows.items() if number == -1}
    assert len(set(first.values())) == len(FAMILIES)


def test_the_matrix_has_every_family_and_every_recipe():
    assert {family for family, _ in CASES} == set(FAMILIES)
    assert {recipe for _, recipe in CASES} == set(RECIPES)
