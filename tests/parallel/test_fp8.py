"""FP8 runs: one result in every layout, an exact resume, a curve that follows bfloat16's.

What the sparse tensor cores compute is computed here by the kernels' definitions.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from tests import dist
from tests.parallel.trace import traced

# 128 wide: FP8 operands come in tiles of 128.
WIDE = [
    "--num-layers", "2", "--hidden-size", "128", "--ffn-hidden-size", "256",
    "--num-attention-heads", "4", "--seq-length", "32", "--micro-batch-size", "2",
    "--global-batch-size", "4", "--train-iters", "12", "--lr", "1e-3", "--vocab-size", "128",
    "--make-vocab-size-divisible-by", "16", "--mask-update-interval", "4", "--eval-iters", "1",
    "--eval-interval", "5", "--split", "90,10,0", "--bf16", "--position-embedding-type", "rope",
    "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
]  # fmt: skip
FP8 = ["--fp8-format", "e4m3", "--fp8-amax-history-len", "3"]
CURRENT = ["--fp8-format", "e4m3", "--fp8-recipe", "tensorwise"]
# With a dense tail: both kinds of FP8 GEMMs.
FST = ["--sparsity-recipe", "fst", "--masked-decay", "1e-3", "--dense-tail-fraction", "0.25"]
S_STE = ["--sparsity-recipe", "s_ste"]
DENSE = ["--sparsity-recipe", "dense", "--mask-update-interval", "none"]
TP2 = ["--tensor-model-parallel-size", "2"]


def fp8_run(rank: int, world: int, flags: list[str]) -> tuple[list[dict[str, Any]], list[list]]:
    """Rows of a run whose device is said to have FP8, and the scales after every step."""
    from megasparse.fp8.delayed import DelayedScaling

    scales: list[list[float]] = []
    finish = DelayedScaling.finish_step

    def recording(self):
        finish(self)
        scales.append(list(self.assumed))

    with (
        mock.patch("megasparse.fp8.transformer_engine.refusal", return_value=None),
        mock.patch.object(DelayedScaling, "finish_step", recording),
    ):
        return traced(rank, world, flags), scales


def current_run(rank: int, world: int, flags: list[str]) -> tuple[list[dict[str, Any]], list]:
    """Rows of such a run with scales of the moment, and the magnitudes that they follow from."""
    from megasparse.fp8 import current

    seen: list[float] = []
    scales_of_amax = current.scales_of_amax

    def recording(amax, **options):
        seen.append(float(amax))
        return scales_of_amax(amax, **options)

    with (
        mock.patch("megasparse.fp8.transformer_engine.refusal", return_value=None),
        mock.patch.object(current, "scales_of_amax", recording),
    ):
        return traced(rank, world, flags), seen


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset):
    """A run of one rank by its recipe; made once."""
    made: dict[str, Any] = {}

    def get(name, recipe, run=fp8_run):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            flags = [*WIDE, *recipe, "--data-path", dataset, "--run-dir", str(folder)]
            made[name] = dist.run(run, 1, flags)[0]
        return made[name]

    return get


# The linears of the attention are dense in all of them.
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("fst", [*FST, *FP8]),
        ("s_ste", [*S_STE, "--fp8-format", "hybrid", "--mvue-groups", "strided"]),
    ],
)
def test_tensor_parallel_ranks_scale_and_train_as_one(runs, tmp_path, dataset, name, recipe):
    rows, scales = runs(name, recipe)
    flags = [*WIDE, *recipe, *TP2, "--data-path", dataset, "--run-dir", str(tmp_path)]
    if name == "s_ste":
        flags.append("--sequence-parallel")
    (split, ours), (_, theirs) = dist.run(fp8_run, 2, flags)
    assert ours == theirs  # both ranks, exactly
    assert [row["samples"] for row in split] == [row["samples"] for row in rows]
    assert split[0]["masks"] == rows[0]["masks"]
    for row, expected in zip(split, rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=5e-3)
    # After the first step weights and draws still agree but for bfloat16's sums.
    assert ours[0] == pytest.approx(scales[0], rel=0.02)


@pytest.mark.parametrize("sequence", [False, True])
def test_shards_are_scaled_by_the_moment_of_the_whole(runs, tmp_path, dataset, sequence):
    rows, whole = runs("current", [*FST, *CURRENT], current_run)
    flags = [*WIDE, *FST, *CURRENT, *TP2, "--data-path", dataset, "--run-dir", str(tmp_path)]
    flags += ["--replica-check-interval", "4"]
    if sequence:
        flags.append("--sequence-parallel")
    (split, ours), (_, theirs) = dist.run(current_run, 2, flags)
    assert ours == theirs  # both ranks, exactly, x, dZ and weights
    assert split[0]["masks"] == rows[0]["masks"]
    for row, expected in zip(split, rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=5e-3)
    if not sequence:  # which gathers x again, and scales it again
        assert len(ours) == len(whole)
        first = len(whole) // len(rows)
        # Weights are equal, the rest but for other roundings of sums.
        assert ours[:first] == pytest.approx(whole[:first], rel=0.05)
        assert len(set(ours[:first]) & set(whole[:first])) >= 4


def test_data_parallel_ranks_scale_alike(runs, tmp_path, dataset):
    rows, _ = runs("fst", [*FST, *FP8])
    flags = [*WIDE, *FST, *FP8, "--data-path", dataset, "--run-dir", str(tmp_path)]
    (split, ours), (_, theirs) = dist.run(fp8_run, 2, flags)
    assert ours == theirs
    for row, expected in zip(split, rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("name", "recipe"), [("fst", [*FST, *FP8]), ("ste", ["--sparsity-recipe", "ste", *FP8])]
)
def test_a_resumed_run_repeats_it(runs, tmp_path, dataset, name, recipe):
    rows, scales = runs(name, recipe)
    flags = [*WIDE, *recipe, "--data-path", dataset, "--run-dir", str(tmp_path)]
    # Step 5 ends with an evaluation, which must leave no trace.
    first, before = dist.run(fp8_run, 1, [*flags, "--exit-interval", "5"])[0]
    second, after = dist.run(fp8_run, 1, [*flags, "--resume"])[0]
    assert [row["loss"] for row in first + second] == [row["loss"] for row in rows]
    assert before + after == scales


def test_a_resumed_run_of_scales_of_the_moment_repeats_it(runs, tmp_path, dataset):
    rows, whole = runs("current", [*FST, *CURRENT], current_run)
    flags = [*WIDE, *FST, *CURRENT, "--data-path", dataset, "--run-dir", str(tmp_path)]
    first, before = dist.run(current_run, 1, [*flags, "--exit-interval", "5"])[0]
    second, after = dist.run(current_run, 1, [*flags, "--resume"])[0]
    assert [row["loss"] for row in first + second] == [row["loss"] for row in rows]
    assert set(before + after) == set(whole)  # weights are prepared once more after a resume
    # The recipe belongs to the run's precision: a change is said, and starts from its own tensors.
    delayed = [*flags, "--resume", "--fp8-recipe", "delayed", "--train-iters", "13"]
    delayed.append("--override-schedule")
    with pytest.raises(Exception, match="trained with fp8_recipe 'tensorwise'"):
        dist.run(fp8_run, 1, delayed)
    more, scales = dist.run(fp8_run, 1, [*delayed, "--override-precision"])[0]
    assert len(more) == len(scales) == 1 and more[0]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("name", ["fst", "current", "dense"])
def test_the_curve_follows_bfloat16(runs, tmp_path, dataset, name):
    recipe = DENSE if name == "dense" else FST
    if name == "fst":
        rows, _ = runs("fst", [*FST, *FP8])
    elif name == "dense":
        rows, _ = runs("dense", [*DENSE, "--fp8-format", "hybrid"])
    else:
        rows, _ = runs("current", [*FST, *CURRENT], current_run)
    flags = [*WIDE, *recipe, "--data-path", dataset, "--run-dir", str(tmp_path)]
    plain = dist.run(traced, 1, flags)[0]
    for row, expected in zip(rows, plain, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    assert rows[0]["masks"] == plain[0]["masks"]
    assert rows[0]["loss"] != plain[0]["loss"] and rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--fp8-format", "e4m3", "--no-bf16"], "expected --bf16"),
        (["--fp8-format", "e4m3", "--simulate-fp8"], "expected one of the two"),
        (
            ["--fp8-format", "e4m3", "--num-attention-heads", "2", "--kv-channels", "20"],
            "FP8 of a dense",
        ),
    ],
)
def test_refusals(tmp_path, dataset, change, words):
    flags = [*WIDE, *S_STE, *change, "--data-path", dataset, "--run-dir", str(tmp_path)]
    flags += ["--mask-update-interval", "none"]
    with pytest.raises(Exception, match=words):
        dist.run(traced, 1, flags)


def test_the_dense_tail_is_the_recipe_dense_in_fp8(runs, tmp_path, dataset):
    rows, scales = runs("fst", [*FST, *FP8])
    assert [row["sparse"] for row in rows[8:]] == [True] + [False] * 3
    flags = [*WIDE, *FP8, "--data-path", dataset, "--run-dir", str(tmp_path)]
    dist.run(fp8_run, 1, [*flags, *FST, "--exit-interval", "9"])
    tail, found = dist.run(fp8_run, 1, [*flags, *DENSE, "--resume", "--override-recipe"])[0]
    assert [row["loss"] for row in tail] == [row["loss"] for row in rows[9:]]
    # The recipe dense draws nothing, and knows no scale of draws.
    assert {*found[-1]} <= {*scales[-1]}


def test_a_shard_that_cuts_a_tile_is_refused(tmp_path, dataset):
    flags = [*WIDE, *FST, *FP8, "--ffn-hidden-size", "192", "--data-path", dataset]
    with pytest.raises(Exception, match="expected multiples of 128"):
        dist.run(fp8_run, 1, [*flags, "--run-dir", str(tmp_path)])


def fused_run(rank: int, world: int, flags: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of a run, and how often MLPs and norms took their fused paths."""
    from megasparse.megatron.blocks import mlp, norms

    with (
        mock.patch.object(mlp, "feed_forward", wraps=mlp.feed_forward) as one,
        mock.patch.object(norms, "norm_to_float8", wraps=norms.norm_to_float8) as other,
    ):
        return traced(rank, world, flags), [one.call_count, other.call_count]


def test_what_is_fused_stays_so_under_zero_3(tmp_path, dataset):
    """ZeRO 3 gathers weights by hooks, which are nobody who looks at the linears' inputs."""
    results = []
    for stage in ("1", "3"):
        flags = [*WIDE, *FST, *FP8, "--train-iters", "4", "--zero-stage", stage]
        flags += ["--data-path", dataset, "--run-dir", str(tmp_path / stage)]
        results.append(dist.run(fused_run, 2, flags))
    for (rows, fused), (expected, as_often) in zip(*results, strict=True):
        assert fused == as_often and min(fused) > 0
        for row, one in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(one["loss"], rel=2e-3)
