"""What is proved of the tensors of a checkpoint, with a reader of known ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasparse.checkpoint import proof
from megasparse.errors import CheckpointError
from megasparse.kernels import transposable24_mask
from megasparse.sparsity.recipe import make_recipe

W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
SPARSE = W * transposable24_mask(W)
ROWS = torch.tensor([[1.0, 2.0, 0.0, 0.0] * 2] * 8)  # 2:4 along rows, two columns are full


def examine(weights, step, recipe="fst", part=0, of=1):
    """The reports of a checkpoint at a step of 10, of which `fst`'s last two are dense."""
    stored = {f"param/{name}": weight for name, weight in weights.items()}
    state = {f"sparsity/{name}/mask": None for name in sorted(weights)}
    reader = SimpleNamespace(
        meta={"step": step},
        keys=lambda prefix: [key for key in {**stored, **state} if key.startswith(prefix)],
        read=stored.__getitem__,
    )
    return proof.check_sparsity(reader, make_recipe(recipe), 10, part, of)


def test_tensors_are_examined_as_they_are_used(monkeypatch):
    monkeypatch.setattr(proof, "effective_weight", lambda reader, name, recipe: SPARSE)
    names = ("z", "a", "m")
    given = dict.fromkeys(names, W)
    reports = examine(given, 5)
    assert tuple(report.name for report in reports) == names  # in the model's order
    for report in reports:
        assert report.shape == (8, 8) and report.density == 0.5
        assert report.rows_24 and report.columns_24
    for report in examine(given, 10):
        assert report.density == 1.0 and not report.rows_24
    (quarter,) = examine({"w": torch.cat([torch.ones(2, 8), torch.zeros(6, 8)])}, 10)
    assert quarter.density == 0.25 and not quarter.rows_24 and quarter.columns_24
    thirds = [[r.name for r in examine(given, 5, part=part, of=2)] for part in range(2)]
    assert thirds == [["z", "m"], ["a"]]


@pytest.mark.parametrize(("recipe", "refused"), [("ste", ["dense"]), ("fst", ["rows", "dense"])])
def test_what_is_not_as_promised_is_named(monkeypatch, recipe, refused):
    weights = {"both": SPARSE, "rows": ROWS, "dense": W}
    monkeypatch.setattr(proof, "effective_weight", lambda reader, name, _: weights[name])
    reports = examine(weights, 5, recipe)
    with pytest.raises(CheckpointError, match=f"as {recipe} promises: {', '.join(refused)}$"):
        proof.require_sparsity(reports, make_recipe(recipe), 5, 10)
    proof.require_sparsity(reports[:1], make_recipe(recipe), 5, 10)
    if recipe == "fst":
        proof.require_sparsity(
            reports, make_recipe(recipe), 10, 10
        )  # a dense tail promises nothing
    lines = proof.format_tensors(reports)
    assert [line.split()[-2:] for line in lines[1:]] == [
        ["yes", "yes"],
        ["yes", "no"],
        ["no", "no"],
    ]
