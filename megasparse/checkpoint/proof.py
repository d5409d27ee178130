"""The proof of 2:4, read back from a saved checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.sparsity_state import effective_weight
from megasparse.errors import CheckpointError
from megasparse.kernels import is_24
from megasparse.sparsity import schedule
from megasparse.sparsity.recipe import SparsityRecipe


@dataclass(frozen=True)
class TensorReport:
    """What one effective weight of a checkpoint is.

    Attributes:
        name, shape: of the whole weight `(N, K)`.
        density: share of non-zeros.
        rows_24: 2:4 along K (W~ in the output GEMM).
        columns_24: 2:4 along N as well (W~^T in grad_input): transposable.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    rows_24: bool
    columns_24: bool


def check_sparsity(
    reader: CheckpointReader, recipe: SparsityRecipe, train_iters: int, part: int = 0, of: int = 1
) -> list[TensorReport]:
    """Examine the effective weight of every layer with a sparsity state.

    In a dense phase (FST's tail) the effective weight is the weight itself.

    Args:
        part, of: examine every `of`-th layer alone, from this one on.
    """
    sparse = schedule.is_sparse_step(recipe, reader.meta["step"], train_iters)
    names = sorted(
        {key.split("/")[1] for key in reader.keys("sparsity/")},
        key=[key.removeprefix("param/") for key in reader.keys("param/")].index,
    )
    reports = []
    for name in names[part::of]:
        stored = f"param/{name}"
        weight = effective_weight(reader, name, recipe) if sparse else reader.read(stored)
        reports.append(
            TensorReport(
                name=name,
                shape=tuple(weight.shape),
                density=float((weight != 0).float().mean()),
                rows_24=is_24(weight),
                columns_24=is_24(weight, dim=0),
            )
        )
    return reports


def require_sparsity(
    reports: list[TensorReport], recipe: SparsityRecipe, step: int, train_iters: int
) -> None:
    """Fail when a tensor is not what the recipe promises at this step.

    Raises:
        CheckpointError: names the tensors.
    """
    recipe = schedule.span_at(recipe, step, train_iters).recipe
    if not recipe.is_sparse:
        return
    wrong = [
        report.name
        for report in reports
        if not report.rows_24 or (recipe.transposable and not report.columns_24)
    ]
    if wrong:
        raise CheckpointError(f"not 2:4 as {recipe.name} promises: {', '.join(wrong)}")


def format_tensors(tensors: list[TensorReport]) -> list[str]:
    """A line for each tensor, under a heading."""
    shapes = ["x".join(str(size) for size in report.shape) for report in tensors]
    # No wider than they have to be: a terminal has 80 columns.
    width, room = max(len(report.name) for report in tensors), max(5, *map(len, shapes))
    lines = [f"{'tensor':<{width}}  {'shape':>{room}}  density  2:4  transposable"]
    for report, shape in zip(tensors, shapes, strict=True):
        rows_24 = "yes" if report.rows_24 else "no"
        columns = "yes" if report.rows_24 and report.columns_24 else "no"
        lines.append(
            f"{report.name:<{width}}  {shape:>{room}}  {report.density:7.4f}  {rows_24:>3}  "
            f"{columns:>12}"
        )
    return lines
