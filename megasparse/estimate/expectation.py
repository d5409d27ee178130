"""Whether 2:4 is expected to be faster than dense at the shapes of a run, before it starts."""

from __future__ import annotations

from typing import NamedTuple

from megasparse.config import ResolvedConfig
from megasparse.config.packaged import commands_folder
from megasparse.estimate.time import GemmTable, StepTime, step_time
from megasparse.log import logger
from megasparse.sparsity.recipe import SparsityRecipe, make_recipe

# Rates that were measured, by a part of the GPU's name.
TABLES = {"H200": "gemm-h200.json"}


class Expectation(NamedTuple):
    """Seconds of a step of the sparse phase, and of the same step with the recipe `dense`."""

    sparse: StepTime
    dense: StepTime

    @property
    def ratio(self) -> float:
        """How much faster than dense."""
        return self.dense.seconds / self.sparse.seconds

    @property
    def pays(self) -> bool:
        """Whether 2:4 gains more than a prediction can tell from nothing."""
        return self.ratio > 1.005

    def describe(self) -> str:
        """One line: both times, and where the difference comes from."""
        line = (
            f"a step of the sparse phase is expected to take {1e3 * self.sparse.seconds:.0f} ms, "
            f"with the recipe dense {1e3 * self.dense.seconds:.0f} ms"
        )
        if self.pays:
            return f"{line} ({self.ratio:.2f} times as fast)"
        ours, theirs = self.sparse.parts, self.dense.parts
        saved = 1e3 * (theirs["GEMMs"] - ours["GEMMs"])
        made = 1e3 * (ours["operands"] - theirs["operands"])
        waits = 1e3 * (self.sparse.waiting - self.dense.waiting)
        why = f"2:4 GEMMs save {saved:.0f} ms, their operands and masks cost {made:.0f} ms"
        if waits >= 1.0:
            why += f", and the GPU waits {waits:.0f} ms longer for the host"
        return f"{line}: 2:4 does not pay here. {why}"


def measured_table(gpu: str) -> GemmTable | None:
    """The measured rates of a GPU, by its name; None: it was not measured."""
    for part, name in TABLES.items():
        path = commands_folder() / "tools" / "results" / name
        if part in gpu and path.is_file():
            return GemmTable(path)
    return None


def expectation(
    config: ResolvedConfig, recipe: SparsityRecipe, vocabulary: int, world: int, table: GemmTable
) -> Expectation:
    """Of a run with a sparse recipe.

    Args:
        vocabulary: padded.
        world: ranks.
    """
    dense = make_recipe("dense")
    return Expectation(
        step_time(config, recipe, vocabulary, world, table),
        step_time(config, dense, vocabulary, world, table),
    )


def tell(
    config: ResolvedConfig, recipe: SparsityRecipe, vocabulary: int, world: int, gpu: str
) -> None:
    """Log what is expected of a BF16 run on GPUs; a warning where 2:4 does not pay.

    Args:
        gpu: its name; nothing is said of one that was not measured.
    """
    table = measured_table(gpu)
    if table is None or not recipe.is_sparse or not config.train.bf16:
        return
    found = expectation(config, recipe, vocabulary, world, table)
    log = logger.info if found.pays else logger.warning
    log("%s", found.describe())
