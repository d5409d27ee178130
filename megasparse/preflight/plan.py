"""Questions to a command line that no run answers: version, settings, and what a run would be.

--version        of megasparse and of what it stands on
--print-config   every setting as YAML, defaults filled in; it can be given to --config
--dry-run        all checks, sizes, layout, memory and checkpoints; nothing is written
--gpus N         ranks to plan for; default: the launcher's, or tensor x pipeline parallel
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import textwrap
from collections.abc import Sequence

from megasparse.config import (
    ResolvedConfig,
    data_parallel_size,
    dump_yaml,
    gradient_accumulation_steps,
    padded_vocab_size,
    read_config,
    smallest_world,
)
from megasparse.config.batches import samples_after
from megasparse.config.shapes import (
    active_parameter_count,
    layer_parameters,
    parameter_count,
)
from megasparse.errors import CheckpointError, ConfigError, DataError
from megasparse.estimate.memory import footprint
from megasparse.preflight.settings import Prepared, prepare
from megasparse.sparsity.phases import summary
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.sparsity.schedule import spans

VERSION, PRINT_CONFIG, DRY_RUN, GPUS = "--version", "--print-config", "--dry-run", "--gpus"
_STANDS_ON = ("torch", "triton", "megatron-core", "deepspeed", "transformer-engine")
GIB = 2**30


def answer(argv: Sequence[str]) -> str | None:
    """The answer to the question in a command line; None: it asks none.

    Raises:
        MegasparseError: the command line is no run.
    """
    if VERSION in argv:
        return versions()
    asked = {PRINT_CONFIG, DRY_RUN} & set(argv)
    if not asked:
        return None
    flags, gpus = _without_questions(argv)
    world = _world(flags, gpus)
    if PRINT_CONFIG in asked:
        return dump_yaml(_settings(flags, world)).rstrip()
    return plan(prepare(flags, world, write=False), world)


def _settings(flags: Sequence[str], world: int) -> ResolvedConfig:
    """Every setting; the files that they name may be made later."""
    settled: list[ResolvedConfig] = []
    try:
        return prepare(flags, world, settled.append, write=False).config
    except (DataError, CheckpointError):
        if not settled:
            raise
        return settled[0]


def versions() -> str:
    """One line: megasparse's version and those of what it stands on."""
    found = []
    for name in ("megasparse", *_STANDS_ON):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def plan(prepared: Prepared, world: int) -> str:
    """What a run of `world` ranks would be, in lines of at most 80 characters where names allow."""
    config = prepared.config
    rows = [
        *_model(config, prepared.data.vocab_size),
        *_layout(config, world),
        *_schedule(config),
        *_data(prepared),
        *_memory(config, prepared.data.vocab_size, world),
        *(("note", note) for note in prepared.notes),
    ]
    shown, before = [], ""
    for name, text in rows:
        head = "" if name == before else name
        shown += textwrap.wrap(
            text,
            80,
            initial_indent=f"{head:<13}",
            subsequent_indent=" " * 13,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
        )
        before = name
    return "\n".join([*shown, "all checks passed; without --dry-run it starts"])


def _model(config: ResolvedConfig, vocab_size: int) -> list[tuple[str, str]]:
    model, recipe = config.model, recipe_of(config)
    padded = padded_vocab_size(vocab_size, config)
    linears = [
        (one.module, f"{model.block}.layers.{layer}.{one.module}")
        for layer in range(model.num_layers)
        for one in layer_parameters(model, layer)
        if one.is_linear
    ]
    sparse = list(dict.fromkeys(name for name, whole in linears if recipe.matches(whole)))
    experts = []
    if model.num_experts is not None:
        active = active_parameter_count(model, padded)
        experts = [
            ("model", f"{active:,} of them for a token"),
            (
                "experts",
                f"{model.num_experts} in {sum(model.expert_layers)} layers, "
                f"{model.moe_router_topk} for a token",
            ),
        ]
    return [
        ("model", f"{parameter_count(model, padded):,} parameters"),
        *experts,
        ("model", f"{model.num_layers} layers, hidden {model.hidden_size}, vocabulary {padded:,}"),
        ("recipe", f"{recipe.name}; 2:4 in {', '.join(recipe.sparse_gemms) or 'no GEMM'}"),
        *(("sparse", name) for name in sparse),
        ("precision", "BF16" if config.train.bf16 else "FP32"),
        *([("precision", f"FP8 {kind}")] if (kind := config.fp8.fp8_format) else []),
    ]


def _layout(config: ResolvedConfig, world: int) -> list[tuple[str, str]]:
    parallel, train = config.parallel, config.train
    sizes = f"tensor {parallel.tensor_model_parallel_size}"
    if parallel.context_parallel_size > 1:
        sizes += f" x context {parallel.context_parallel_size}"
    sizes += f" x pipeline {parallel.pipeline_model_parallel_size}"
    sizes += f" x data {data_parallel_size(config, world)}, ZeRO {parallel.zero_stage}"
    rows = [("layout", f"{world} ranks: {sizes}")]
    if parallel.expert_model_parallel_size > 1:
        rows.append(("layout", f"experts over {parallel.expert_model_parallel_size} of these"))
    if parallel.sequence_parallel:
        rows.append(("layout", "sequence parallel"))
    if parallel.recompute_granularity:
        rows.append(("layout", f"recompute {parallel.recompute_granularity}"))
    tokens = config.model.seq_length
    rows.append(("batch", f"{train.global_batch_size} sequences of {tokens} tokens"))
    count = gradient_accumulation_steps(config, world)
    return [*rows, ("batch", f"{count} micro-batches of {train.micro_batch_size} on a rank")]


def _schedule(config: ResolvedConfig) -> list[tuple[str, str]]:
    train = config.train
    tokens = samples_after(train, train.train_iters) * config.model.seq_length
    rows = [("length", f"{train.train_iters:,} steps, {tokens:,} tokens")]
    recipe = recipe_of(config)
    for span in spans(recipe, train.train_iters) if recipe.is_sparse else ():
        steps = f"steps {span.steps.start + 1:,} to {span.steps.stop:,}"
        rows.append(("phase", f"{steps}: {summary(span.recipe)}"))
    return [*rows, ("rate", f"{train.lr_decay_style}, {train.lr:g} to {train.min_lr:g}")]


def _data(prepared: Prepared) -> list[tuple[str, str]]:
    rows = [
        ("data", f"{source.prefix}: {int(source.lengths.sum()):,} tokens ({split})")
        for split, sources in prepared.data.sources.items()
        for source in sources
    ]
    if (classes := prepared.data.classes) is not None:
        return [
            ("data", f"{len(texts.texts):,} texts of {len(classes.names)} classes ({split})")
            for split, texts in classes.splits.items()
        ]
    return rows or [("data", "generated (--mock-data)")]


def _memory(config: ResolvedConfig, vocab_size: int, world: int) -> list[tuple[str, str]]:
    recipe, vocabulary = recipe_of(config), padded_vocab_size(vocab_size, config)
    stages = range(config.parallel.pipeline_model_parallel_size)
    found = [footprint(config, recipe, vocabulary, world, stage) for stage in stages]
    fullest = max(found, key=lambda stage: stage.peak_bytes)
    parts = {**fullest.state, **fullest.transient}
    rows = [("memory", f"{fullest.peak_bytes / GIB:.1f} GiB on a GPU at the peak, estimated")]
    rows += [("memory", f"  {name:<12} {size / GIB:8.2f} GiB") for name, size in parts.items()]
    every = config.checkpoint.save_interval
    when = f"every {every:,} steps" if every else "at the end"
    whole = parameter_count(config.model, vocabulary) * (14 if config.train.bf16 else 12) / GIB
    return [*rows, ("checkpoints", f"{when}, {whole:.1f} GiB each, in {config.checkpoint.save}")]


def _without_questions(argv: Sequence[str]) -> tuple[list[str], int | None]:
    """The flags of the run, and `--gpus`."""
    flags, gpus, words = [], None, iter(argv)
    for word in words:
        if word == GPUS or word.startswith(f"{GPUS}="):
            value = word.partition("=")[2] or next(words, "")
            if not value.isdigit() or not int(value):
                raise ConfigError(f"{GPUS}: found {value!r}, expected a whole number at least 1")
            gpus = int(value)
        elif word not in (PRINT_CONFIG, DRY_RUN):
            flags.append(word)
    return flags, gpus


def _world(flags: Sequence[str], gpus: int | None) -> int:
    if gpus is not None:
        return gpus
    smallest = smallest_world(read_config(flags)[0])
    launched = os.environ.get("WORLD_SIZE", "")
    return int(launched) if launched.isdigit() and int(launched) else smallest
