"""Look into a checkpoint's sparsity: how often each 2:4 pattern occurs, and what the masks keep.

    python tools/inspect_sparsity.py runs/first/checkpoints
    python tools/inspect_sparsity.py runs/first/checkpoints/step-00000200 --output sparsity.png

A folder of checkpoints stands for its newest intact one. For every layer the mask that its weight
has now is computed by the recipe (the stored one may be some steps old) and compared with it.

* entropy: of the patterns' frequencies in bits; log2 6 = 2.585 or log2 90 = 6.492 for even ones.
* L1, L2: norm of W o M / norm of W. A random mask keeps 0.5 and 0.707.
* stale: share of entries in which the stored mask differs from the one computed now.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megasparse.megatron.import_without_compile import import_megatron

import_megatron()  # before the imports that need it

import torch

from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.sparsity_state import effective_weight, run_length
from megasparse.cli import guarded
from megasparse.config import from_dict
from megasparse.errors import CheckpointError, StorageError
from megasparse.kernels import prune24_mask, transposable24_mask
from megasparse.kernels.patterns import decode_patterns, encode_patterns
from megasparse.metrics import plots
from megasparse.progress import progress
from megasparse.sparsity import schedule
from megasparse.sparsity.recipe import SparsityRecipe
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.train.checkpoint import newest_valid


@dataclass(frozen=True)
class Layer:
    """Statistics of one weight `(N, K)`.

    Attributes:
        counts: blocks (or groups) by pattern.
        retained_l1, retained_l2: share of the weight's norm that the mask keeps.
        density: non-zeros of the weight in use.
        stale: entries in which the stored mask differs; None without one.
        scale: S-STE's beta, or None.
    """

    name: str
    shape: tuple[int, ...]
    counts: tuple[int, ...]
    retained_l1: float
    retained_l2: float
    density: float
    stale: float | None
    scale: float | None

    @property
    def shares(self) -> list[float]:
        return [count / sum(self.counts) for count in self.counts]

    @property
    def entropy(self) -> float:
        """Bits of the patterns' frequencies."""
        return -sum(share * math.log2(share) for share in self.shares if share)


def open_checkpoint(path: Path) -> CheckpointReader:
    """The checkpoint, or the newest intact one of a folder of them, verified.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "manifest.json").is_file():
        return CheckpointReader(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    reader = newest_valid(folder) if folder.is_dir() else None
    if reader is None:
        raise CheckpointError(f"{path}: holds no checkpoint")
    return reader


def inspect_layer(
    reader: CheckpointReader, name: str, recipe: SparsityRecipe, sparse: bool
) -> Layer:
    """Statistics of one weight.

    Args:
        sparse: whether the checkpoint is in its sparse phase.
    """
    weight = reader.read(f"param/{name}").float()
    now = schedule.span_at(recipe, reader.meta["step"], run_length(reader)).masks
    search = transposable24_mask if now.transposable else prune24_mask
    mask = search(weight)
    kinds = 90 if now.transposable else 6
    counts = torch.bincount(
        encode_patterns(mask, transposable=now.transposable).flatten().int(), minlength=kinds
    )
    used = effective_weight(reader, name, recipe) if sparse else weight
    prefix, stale, scale = f"sparsity/{name}/", None, None
    if f"{prefix}mask" in reader:
        indices = reader.read(f"{prefix}mask")
        both = indices.shape[0] < weight.shape[0]
        stored = decode_patterns(indices, weight.shape, transposable=both)
        stale = float((stored != mask).float().mean())
    if f"{prefix}scale" in reader:
        scale = float(reader.read(f"{prefix}scale"))
    kept = weight * mask
    return Layer(
        name,
        tuple(weight.shape),
        tuple(counts.tolist()),
        float(kept.abs().sum() / weight.abs().sum()),
        float(kept.norm() / weight.norm()),
        float((used != 0).float().mean()),
        stale,
        scale,
    )


def format_table(layers: Sequence[Layer]) -> str:
    """A line a layer."""
    width = max(len(layer.name) for layer in layers)
    head = f"{'weight':<{width}}  {'shape':>13}  density      L1      L2   stale  entropy"
    lines = [head + "  most and least frequent pattern" + "    scale"]
    for layer in layers:
        shape = "x".join(str(size) for size in layer.shape)
        most = max(range(len(layer.counts)), key=lambda i: layer.counts[i])
        least = min(range(len(layer.counts)), key=lambda i: layer.counts[i])
        stale = "      -" if layer.stale is None else f"{layer.stale:7.4f}"
        scale = "       -" if layer.scale is None else f"{layer.scale:8.4f}"
        lines.append(
            f"{layer.name:<{width}}  {shape:>13}  {layer.density:7.4f}  {layer.retained_l1:.4f}  "
            f"{layer.retained_l2:.4f} {stale}  {layer.entropy:7.3f}  "
            f"{most:>4}: {layer.shares[most]:.4f}, {least:>4}: {layer.shares[least]:.4f}      "
            f"{scale}"
        )
    return "\n".join(lines)


def inspect(path: Path, output: Path | None) -> None:
    """Print the table of a checkpoint; draw it, if there is an output."""
    reader = open_checkpoint(path)
    config = from_dict(reader.meta["config"], str(reader.folder))
    recipe = recipe_of(config)
    stored = {key.split("/")[1] for key in reader.keys("sparsity/")}
    names = [key.removeprefix("param/") for key in reader.keys("param/")]
    names = [name for name in names if name in stored]
    if not names:
        raise CheckpointError(
            f"{reader.folder}: no layer is sparse (sparsity_recipe {recipe.name})"
        )
    step = reader.meta["step"]
    sparse = schedule.is_sparse_step(recipe, step, run_length(reader))
    layers = [
        inspect_layer(reader, name, recipe, sparse)
        for name in progress(names, desc="masks", unit="layer")
    ]
    phase = "sparse" if sparse else "dense"
    print(f"{reader.folder}: recipe {recipe.name}, step {step}, {phase} phase")
    print(format_table(layers))
    if output is None:
        return
    if not plots.available():
        print(f"no picture: {plots.MISSING}")
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}.png")
    try:
        plots.patterns(
            temporary,
            {layer.name: layer.shares for layer in layers},
            {layer.name: (layer.retained_l1, layer.retained_l2) for layer in layers},
        )
        temporary.replace(output)
    except OSError as error:
        raise StorageError(f"{output}: cannot be written: {error}") from None
    print(f"picture: {output}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint, or its folder")
    parser.add_argument("--output", type=Path, help="PNG to draw")
    options = parser.parse_args(argv)
    return guarded("inspect_sparsity.py", lambda: inspect(options.checkpoint, options.output))


if __name__ == "__main__":
    sys.exit(main())
