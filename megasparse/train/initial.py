"""Weights that a run starts from or learns from, by parameter name, whatever they come from.

`Weights` is the seam: a name for messages and a function from a parameter's name to the whole
tensor on the CPU. Here checkpoints of megasparse give it; any other source of weights can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megasparse.config import RunConfig, from_dict
from megasparse.errors import CheckpointError, ConfigError
from megasparse.log import logger
from megasparse.megatron.grid import Grid
from megasparse.megatron.init import parameter_shard
from megasparse.megatron.sparsify import boost_names, initial_boosts
from megasparse.optim.fragments import Fragment
from megasparse.sparsity import schedule
from megasparse.train.checkpoint import effective_weight
from megasparse.train.control import Control
from megasparse.train.engine import Engine
from megasparse.train.precheck import recipe_of
from megasparse.train.saver import choose
from megasparse.train.storage import CheckpointReader

# Fields that say what function the weights compute; the rest may differ between two runs.
DEFINING = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "position_embedding_type", "rotary_base", "rotary_percent", "normalization",
    "norm_epsilon", "swiglu", "disable_bias_linear", "untie_embeddings_and_output_weights",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A model's parameters, one by one.

    Attributes:
        where: for messages.
        read: the whole parameter of a name, on the CPU; CheckpointError if there is none.
    """

    where: str
    read: Callable[[str], torch.Tensor]


def start(engine: Engine, control: Control, digests: dict[str, str], fresh: bool) -> None:
    """Give the model its initial weights and the teacher its own; a collective call.

    Args:
        control: of all ranks.
        digests: of this run's data and tokenizer.
        fresh: the run starts here; else its own checkpoint has been loaded.
    """
    config, grid = engine.config, engine.grid
    found = initial_weights(config, control, digests) if fresh else None
    if found is not None:
        put_weights(engine.model, found, grid, engine.fragments, boost_names(engine.model))
        logger.info("starting from the weights of %s", found.where)
    if fresh:
        for parameter, value in initial_boosts(engine.model):
            set_parameter(parameter, value, engine.fragments)
    if engine.distillation is not None:
        teacher = teacher_weights(config, control, digests)
        put_weights(engine.distillation.teacher.view, teacher, grid)
        engine.distillation.teacher.freeze()
        engine.distillation.describe(teacher.where)


def stored_weights(reader: CheckpointReader, effective: bool = False) -> Weights:
    """The weights of a verified checkpoint.

    Args:
        effective: pruned ones as the GEMMs use them, if the run was sparse where it was saved;
            else the master weights.
    """

    def read(name: str) -> torch.Tensor:
        return reader.read(f"param/{name}")

    def read_effective(name: str) -> torch.Tensor:
        if f"sparsity/{name}/counters" in reader:
            return effective_weight(reader, name, recipe)
        return read(name)

    if not effective:
        return Weights(str(reader.folder), read)
    config = from_dict(reader.meta["config"], str(reader.folder))
    recipe = recipe_of(config)
    sparse = schedule.is_sparse_step(recipe, reader.meta["step"], config.train.train_iters)
    return Weights(str(reader.folder), read_effective if sparse else read)


def initial_weights(config: RunConfig, control: Control, digests: dict[str, str]) -> Weights | None:
    """What `--load` with `--finetune` starts from; None for a run that starts from nothing.

    Args:
        digests: of this run's data and tokenizer.

    Raises:
        CheckpointError: none is intact. ConfigError: of another model, or another tokenizer.
    """
    settings = config.checkpoint
    if not settings.finetune or settings.load is None:
        return None
    return stored_weights(open_model(Path(settings.load), "load", config, control, digests))


def teacher_weights(config: RunConfig, control: Control, digests: dict[str, str]) -> Weights:
    """What the teacher knows: `--teacher-load`, or what the run itself started from.

    Raises:
        CheckpointError: none is intact. ConfigError: of another model, or another tokenizer.
    """
    if config.distillation.teacher_load is not None:
        folder = Path(config.distillation.teacher_load)
        reader = open_model(folder, "teacher_load", config, control, digests)
        return stored_weights(reader, effective=True)
    found = initial_weights(config, control, digests)
    assert found is not None, "checked before the run was started (precheck)"
    return found


def open_model(
    folder: Path, flag: str, config: RunConfig, control: Control, digests: dict[str, str]
) -> CheckpointReader:
    """The newest intact checkpoint of a folder, of the run's model and tokenizer."""
    reader = choose(folder, control)
    if reader is None:
        raise CheckpointError(f"{flag}: {folder} holds no checkpoint")
    saved = reader.meta["config"].get("model", {})
    for name in DEFINING:
        if name in saved and saved[name] != getattr(config.model, name):
            raise ConfigError(
                f"{flag}: {reader.folder} has {name} {saved[name]!r}, this run has "
                f"{getattr(config.model, name)!r}"
            )
    before, now = (d.get("tokenizer") for d in (reader.meta["digests"], digests))
    if before != now and not config.checkpoint.override_tokenizer:
        raise ConfigError(
            f"{flag}: {reader.folder} was trained with another tokenizer (--override-tokenizer)"
        )
    return reader


def put_weights(
    model: torch.nn.Module,
    weights: Weights,
    grid: Grid,
    fragments: list[Fragment] | None = None,
    leave: frozenset[str] = frozenset(),
) -> None:
    """Put weights into this rank's part of a model, and into its optimizer's float32 masters.

    Args:
        model: parameters have the whole model's names.
        fragments: where they lie in the optimizer's tensors, if there is one.
        leave: names that the weights do not have.

    Raises:
        CheckpointError: another shape than the model's.
    """
    for name, parameter in model.named_parameters():
        if name in leave:
            continue
        whole = weights.read(name)
        shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
        if tuple(whole.shape) != shard.global_shape:
            raise CheckpointError(
                f"{weights.where}: {name} has shape {tuple(whole.shape)}, the model expects "
                f"{shard.global_shape}"
            )
        set_parameter(parameter, shard.take(whole), fragments or [])


@torch.no_grad()
def set_parameter(
    parameter: torch.nn.Parameter, local: torch.Tensor, fragments: list[Fragment]
) -> None:
    """Overwrite a parameter's local part, and the float32 master of it that this rank holds."""
    parameter.copy_(local)
    for fragment in fragments:
        if fragment.parameter is parameter and fragment.tensor is not parameter:
            part = fragment.of_parameter(local.to(fragment.tensor))
            fragment.of(fragment.tensor.data).copy_(part)
