"""Weights that a run starts from, and those that its teacher has.

They come from a Hugging Face folder (`--load-hf`), from an imported checkpoint (`--load`), or from
the weights alone of another run (`--load` with `--finetune`). The run starts at step 0; its model
must be the same, all other settings are its own. Its optimizer is fresh, or goes on with moments
and step count of an imported checkpoint that has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.model import StoredModel
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import choose
from megasparse.config import ResolvedConfig
from megasparse.convert.huggingface.folder import HuggingFaceModel
from megasparse.convert.optimizer_state import MOMENTS
from megasparse.convert.source import PartSource, check_model
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError, ConfigError
from megasparse.log import logger
from megasparse.megatron.grid import Grid
from megasparse.megatron.init import parameter_shard
from megasparse.megatron.sparsify import initial_low_rank_weights, low_rank_weight_names
from megasparse.optim.fragments import Fragment
from megasparse.preflight.settings import no_teacher
from megasparse.train.checkpoint import moment
from megasparse.train.engine.base import Engine
from megasparse.train.kept import keep, kept_low_rank_weights

Gather = Callable[..., contextlib.AbstractContextManager[Any]]


class WeightSources:
    """Where a run's first weights and its teacher's are.

    Args:
        config: of the run.
        control: of all ranks; all calls are collective.
        digests: of this run's data and tokenizer.
        vocab_size: of the run, before padding.
        reader: of the checkpoint that the run found, if any; `--load` is not read twice.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        control: ControlPlane,
        digests: dict[str, str],
        vocab_size: int,
        reader: CheckpointReader | None,
    ) -> None:
        self._config, self._control, self._digests = config, control, digests
        self._vocab_size = vocab_size
        self._reader = reader
        self.fresh = reader is None or reader.imported

    def initial(self) -> PartSource | None:
        """The weights that the run started from, or starts from; None: it begins at random.

        Raises:
            CheckpointError: none is intact. ConfigError: of another model, or another tokenizer.
        """
        settings = self._config.checkpoint
        imported = self._reader is not None and self._reader.imported
        source: PartSource
        if self._reader is not None and imported:
            source = StoredModel(self._reader)
        elif settings.load_hf is not None:
            source = HuggingFaceModel(Path(settings.load_hf))
        elif settings.load is not None:
            reader = self._open(settings.load, "load")
            if not reader.imported and not settings.finetune:
                return None
            source = self._stored(reader, "load", effective=False)
        else:
            return None
        check_model(source, self._config.model, self._vocab_size)
        return source

    def teacher(self) -> PartSource:
        """The teacher's weights: of `--teacher-load`, or those that the run itself started from.

        Raises:
            CheckpointError: none is intact. ConfigError: of another model or tokenizer, or there
                is nothing that the run started from.
        """
        wanted = self._config.distillation
        if wanted.teacher_load is None:
            source = self.initial()
            if source is None:
                raise ConfigError(no_teacher(wanted.kd_loss_weight))
            return source
        reader = self._open(wanted.teacher_load, "teacher_load")
        source = self._stored(reader, "teacher_load", effective=True)
        check_model(source, self._config.model, self._vocab_size)
        return source

    def takes_moments(self, source: StoredModel) -> bool:
        """Whether the optimizer goes on with what an imported checkpoint holds of Adam's state."""
        imported, settings = source.reader.imported, self._config.checkpoint
        return imported and bool(source.optimizer_steps) and not settings.finetune

    def _open(self, folder: str, flag: str) -> CheckpointReader:
        reader = choose(Path(folder), self._control)
        if reader is None:
            raise CheckpointError(f"{flag}: {folder} holds no checkpoint")
        return reader

    def _stored(self, reader: CheckpointReader, flag: str, effective: bool) -> StoredModel:
        """A checkpoint whose tokens are this run's."""
        before, now = (d.get("tokenizer") for d in (reader.meta["digests"], self._digests))
        differs = not reader.imported and before != now
        if differs and not self._config.checkpoint.override_tokenizer:
            raise ConfigError(
                f"{flag}: {reader.folder} was trained with another tokenizer (--override-tokenizer)"
            )
        return StoredModel(reader, effective=effective)


def put_initial_weights(engine: Engine, sources: WeightSources) -> bool:
    """Give a fresh model its initial weights, and any teacher its own.

    Returns:
        Whether a run begins with weights that were given.
    """
    grid = engine.grid
    source = sources.initial() if sources.fresh else None
    if source is not None:
        put_weights(
            engine.model,
            source,
            grid,
            engine.fragments,
            skip=low_rank_weight_names(engine.model) | _new_heads(engine, source),
            gathered=engine.layout.gathered_parameters,
        )
        if isinstance(source, StoredModel) and sources.takes_moments(source):
            _put_moments(engine, source)
        logger.info("starting from the weights of %s", source.where)
        keep(engine.controller, source)
    if sources.fresh:
        kept = kept_low_rank_weights(engine.model, engine.controller.recipe, source, grid)
        for parameter, value in kept or initial_low_rank_weights(engine.model):
            set_parameter(parameter, value, engine.fragments)
        for state, _ in engine.controller.weights:
            state.invalidate()
    if engine.layout.distillation is not None:
        teacher = sources.teacher()
        put_weights(engine.layout.distillation.teacher.view, teacher, grid)
        engine.layout.distillation.teacher.freeze()
        engine.layout.distillation.describe(teacher.where)
    return source is not None


@torch.no_grad()
def _put_moments(engine: Engine, source: StoredModel) -> None:
    """Adam's moments of this rank's pieces of all parameters, and the steps that they have seen."""
    grid, steps = engine.grid, source.optimizer_steps
    for fragment in engine.fragments:
        shard = parameter_shard(fragment.parameter, grid.tp_rank, grid.tp_size)
        for kind in MOMENTS:
            value = source.moment_part(fragment.name, kind, shard)
            if value is None:  # a low-rank weight of this run alone
                continue
            target = fragment.of(moment(engine, fragment.tensor, kind, steps))
            target.copy_(fragment.of_parameter(value))
    logger.info("the optimizer goes on after its %d steps", steps)


def _new_heads(engine: Engine, source: PartSource) -> frozenset[str]:
    """Parameters of a head for classes that begin as they were drawn: pre-training has none."""
    if engine.config.model.num_classes is None:
        return frozenset()
    there = {entry.name for entry in source.entries()}
    heads = ("classification_head.", "pooler.")
    names = (name for name, _ in engine.model.named_parameters() if name.startswith(heads))
    return frozenset(names) - there


def put_weights(
    model: torch.nn.Module,
    source: PartSource,
    grid: Grid,
    fragments: list[Fragment] | None = None,
    skip: frozenset[str] = frozenset(),
    gathered: Gather = lambda *_, **__: contextlib.nullcontext(),
) -> None:
    """Put weights into this rank's part of a model, and into its optimizer's float32 masters.

    Args:
        model: parameters have the whole model's names.
        fragments: where they lie in the optimizer's tensors, if there is one.
        skip: names that the source does not have.
        gathered: `Layout.gathered_parameters` of a model that is trained.

    Raises:
        CheckpointError: another shape than the model's.
    """
    for name, parameter in model.named_parameters():
        if name in skip:
            continue
        shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
        value = source.read_part(name, shard)
        with gathered([parameter], write=True):
            set_parameter(parameter, value, fragments or [])


@torch.no_grad()
def set_parameter(
    parameter: torch.nn.Parameter, local: torch.Tensor, fragments: list[Fragment]
) -> None:
    """Overwrite a parameter's local part, and the float32 master of it that this rank holds.

    Args:
        parameter: of the model, of any float dtype.
        local: this rank's shard, in the parameter's shape; rounded to its dtype.
        fragments: where the optimizer's tensors hold pieces of parameters (ZeRO, masters).
    """
    parameter.copy_(local)
    for fragment in fragments:
        if fragment.parameter is parameter and fragment.tensor is not parameter:
            part = fragment.of_parameter(local.to(fragment.tensor))
            fragment.of(fragment.tensor.data).copy_(part)
