"""A model to a Hugging Face folder: plain weights, or 2:4 matrices packed; proven 2:4 on the way.

By default sparse layers are written as what every engine loads: dense tensors with the zeros in
place, and nothing about sparsity in `config.json`. What is 2:4 is told by a side file.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megasparse.atomic_files import new_folder, replacing, write_json, write_text
from megasparse.config.shapes import VOCABULARY
from megasparse.convert.huggingface.architecture import (
    architecture_of,
    huggingface_config,
    model_config,
)
from megasparse.convert.huggingface.folder import CONFIG, SCALES, read_json
from megasparse.convert.huggingface.layout import Rule, rules
from megasparse.convert.huggingface.model_card import CARD, Facts, model_card
from megasparse.convert.huggingface.shards import Group, write_model
from megasparse.convert.packed import FORMATS, pack_checked
from megasparse.convert.source import Source, check_model
from megasparse.data.tokenizers.special_tokens import GENERATION_CONFIG
from megasparse.errors import CheckpointError, ConfigError, StorageError
from megasparse.input_files import read_regular
from megasparse.kernels import is_24
from megasparse.tensor_files import Entry, write_tensors

SIDE_FILE = "sparsity.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_FORMAT = 1


@dataclass
class ExportOptions:
    """How a model is written.

    Attributes:
        max_shard_bytes: of a file.
        config: `config.json` that the model came with; None: one is made from its sizes.
        carried: other small files to copy, by their name in the output.
        extra_files: other small files to write, JSON or bytes by name.
        extra_tensors: files of tensors beside the model, by name.
        special: ids of bos, eos and pad by their names in `config.json` and
            `generation_config.json`; empty: as they come with `config`, or unknown.
        stops: other tokens that end a generation (an answer).
        facts: of the run, for the model card.
        sparse: parameters that must be 2:4.
        transposable: they must be so along both dimensions.
        packing: one of `packed.FORMATS` for those; None: dense with the zeros in place.
        bar: show a progress bar.
    """

    max_shard_bytes: int
    config: Path | None = None
    carried: dict[str, Path] = field(default_factory=dict)
    extra_files: dict[str, Any] = field(default_factory=dict)
    extra_tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    special: dict[str, int | None] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)
    facts: Facts | None = None
    sparse: frozenset[str] = frozenset()
    transposable: bool = False
    packing: str | None = None
    bar: bool = False


def write_huggingface(source: Source, output: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a model into a new or empty folder.

    Returns:
        What the side file says of every tensor, by name; written if the model is sparse.

    Raises:
        ConfigError: no Hugging Face architecture computes the model, or it is not that of
            `options.config`, or a matrix cannot be packed.
        CheckpointError: a weight is damaged or not finite, or is not 2:4 and must be.
        StorageError: the output is not empty, or cannot be written.
    """
    entries = {entry.name: entry for entry in source.entries()}
    config = _config(source, options, entries)
    architecture = architecture_of(config, str(output))
    tensors: dict[str, Any] = {}
    groups = []
    for rule in rules(source.model, architecture):
        make = functools.partial(_make, source, rule, options, tensors)
        stored = _stored_entries(rule, entries[rule.name].dtype, options)
        groups.append(Group(tuple(stored), make))
    with new_folder(output, StorageError) as folder:
        written = write_model(folder, groups, options.max_shard_bytes, options.bar)
        for record in tensors.values():
            names = record.pop("stored")
            if options.packing and len(names) > 1:
                record["stored"] = {name: written[name] for name in names}
            else:
                record.update(written[names[0]])
        write_json(folder / CONFIG, config, indent=2)
        for name, path in options.carried.items():
            with replacing(folder / name) as stream:
                stream.write(read_regular(path))
        _write_generation_config(folder, config, options)
        if scales := source.frozen_scales():
            write_json(folder / SCALES, scales, indent=2)
        for name, content in options.extra_files.items():
            if isinstance(content, bytes):
                with replacing(folder / name) as stream:
                    stream.write(content)
            else:
                write_json(folder / name, content, indent=2)
        for name, extra in options.extra_tensors.items():
            entries_of = [Entry.of(key, value) for key, value in extra.items()]
            with replacing(folder / name) as stream:
                write_tensors(stream, entries_of, extra.__getitem__, {})
        if options.sparse:
            packing = options.packing or "dense"
            side = {"format": _FORMAT, "packing": packing, "source": source.origin}
            write_json(folder / SIDE_FILE, {**side, "tensors": tensors}, indent=2)
        names = ("tokenizer.json", "tokenizer.model")
        has_tokenizer = any((folder / name).is_file() for name in names)
        card = model_card(
            source.model, source.origin, tensors, options.packing, options.facts, has_tokenizer
        )
        write_text(folder / CARD, card)
    return tensors


def _config(source: Source, options: ExportOptions, entries: dict[str, Entry]) -> dict[str, Any]:
    """The `config.json` to write."""
    kinds = {str(entry.dtype).removeprefix("torch.") for entry in entries.values()}
    dtype = kinds.pop() if len(kinds) == 1 else "float32"
    if options.config is None:
        made = huggingface_config(source.model, dtype)
        return {**made, **dict.fromkeys(_SPECIAL), **options.special}
    config = read_json(options.config)
    described = model_config(config, str(options.config))
    check_model(source, described, described.vocab_size)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    return config | _kept_lists(config, options.special)


def _write_generation_config(folder: Path, config: dict[str, Any], options: ExportOptions) -> None:
    """As it came with the model, with the tokens that the run used."""
    path = folder / GENERATION_CONFIG
    before = read_json(path) if path.is_file() else {}
    known = {name: config[name] for name in _SPECIAL if config.get(name) is not None}
    written = {**known, **before, **_kept_lists(before, options.special)}
    if options.stops:
        ends = written.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
        written["eos_token_id"] = list(dict.fromkeys([*ends, *options.stops]))
    write_json(path, written, indent=2)


def _kept_lists(before: dict[str, Any], special: dict[str, int | None]) -> dict[str, Any]:
    """The run's tokens; where several end a text and the run's is among them, all stay."""
    return {
        name: value if not isinstance(now := before.get(name), list) or value not in now else now
        for name, value in special.items()
    }


def _stored_entries(rule: Rule, dtype: torch.dtype, options: ExportOptions) -> list[Entry]:
    stored: list[Entry] = []
    for part, shape in zip(rule.parts, rule.part_shapes(), strict=True):
        if rule.name not in options.sparse or options.packing is None:
            stored.append(Entry(part, dtype, shape))
            continue
        packing = FORMATS[options.packing]
        matrix = shape[::-1] if rule.transposed else shape
        if reason := packing.refusal(matrix, dtype):
            raise ConfigError(f"{options.packing}: {part} {reason}")
        stored += packing.entries(part, matrix, dtype)
    return stored


def _make(
    source: Source, rule: Rule, options: ExportOptions, tensors: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The stored tensors of a parameter; notes in `tensors` what they are."""
    must = rule.name in options.sparse
    made: dict[str, torch.Tensor] = {}
    for part, value in zip(rule.parts, rule.split(source.read(rule.name)), strict=True):
        matrix = value.t() if rule.transposed else value
        rows_24, columns_24 = _found(rule.name, matrix)
        if must:
            _prove(part, rule.name, rows_24, columns_24, options.transposable)
        stored = {part: value.contiguous()}
        if must and options.packing:
            stored = pack_checked(FORMATS[options.packing], part, matrix.contiguous())
        made.update(stored)
        tensors[part] = {
            "parameter": rule.name,
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "2:4": rows_24,
            "transposable": rows_24 and columns_24,
            # Of the tensor as listed: along which of its dimensions two of four are zero.
            "dim": (0 if rule.transposed else 1) if rows_24 else None,
            "density": int(value.count_nonzero()) / value.numel(),
            "stored": list(stored),
        }
    return made


def _found(name: str, matrix: torch.Tensor) -> tuple[bool, bool]:
    """Whether a linear layer's matrix (out, in) is 2:4 along its rows, and along its columns."""
    if matrix.dim() != 2 or name in VOCABULARY or "embedding" in name:
        return False, False
    rows, columns = matrix.shape
    return (
        columns % 4 == 0 and is_24(matrix),
        rows % 4 == 0 and is_24(matrix, dim=0),
    )


def _prove(part: str, name: str, rows_24: bool, columns_24: bool, transposable: bool) -> None:
    if not rows_24:
        raise CheckpointError(f"{part} (of {name}) is not 2:4 along its input dimension")
    if transposable and not columns_24:
        raise CheckpointError(f"{part} (of {name}) is 2:4, but not transposable")
