"""Defaults < YAML files (each with its `base`) < flags, strictly: unknown keys are errors.

A `RunConfig` is built from three sources, each overriding the one before. Errors name the key, what
was found, what was expected and, for an unknown name, the nearest valid one; all are told at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasparse.config import command_line
from megasparse.config.command_line import CommandLine
from megasparse.config.deepspeed.json_file import take_over
from megasparse.config.fields import ALIASES, FIELDS, FieldInfo, convert, is_text, nearest_field
from megasparse.config.inputs import locate, replace_sources
from megasparse.config.packaged import find_config
from megasparse.config.schema import RunConfig
from megasparse.errors import ConfigError, together
from megasparse.extras import missing
from megasparse.input_files import read_regular, shown

try:
    import yaml
    from yaml import SafeLoader
except ImportError:  # megasparse.nn takes its settings from Python
    yaml, SafeLoader = None, object  # type: ignore[assignment, misc]

__all__ = ["ALIASES", "FIELDS", "FieldInfo", "dump_yaml", "from_dict", "load_config", "read_config"]


def load_config(argv: Sequence[str], yaml_path: str | None = None) -> RunConfig:
    """The configuration of `defaults < --config FILE < --config FILE < ... < flags`.

    `run_dir` is `save`, or `runs/` and the files' names joined by `_`, unless a file or a flag
    sets it.

    Args:
        argv: flags, without the program's name. Every `--config FILE` names a YAML file, later ones
            win; `--local_rank N` (DeepSpeed's launcher adds it) is accepted and ignored.
        yaml_path: used when argv has no `--config`.

    Raises:
        ConfigError: unknown keys or flags, wrong types, values out of their range; all of them.
    """
    config, line = read_config(argv, yaml_path)
    if line.problems:
        raise together(line.problems)
    return config


def read_config(
    argv: Sequence[str], yaml_path: str | None = None, world_size: int | None = None
) -> tuple[RunConfig, CommandLine]:
    """As `load_config`, but nothing is raised: what is wrong is left out, and in `problems`.

    Args:
        world_size: ranks of the run, for a batch that DeepSpeed's JSON gives by its micro-batches.
    """
    line = command_line.read(argv)
    paths = [Path(path) for path in line.configs or ([yaml_path] if yaml_path else [])]
    paths = [find_config(path) for path in paths]
    config = RunConfig()
    if paths:
        config.checkpoint.run_dir = "runs/" + "_".join(path.stem for path in paths)
    named = config.checkpoint.run_dir
    for path in paths:
        try:
            _apply_yaml(config, path, line)
        except ConfigError as error:
            line.problems.append(str(error))
    replace_sources(config, line.values)
    for name, value in line.values.items():
        _assign(config, FIELDS[name], value, FIELDS[name].flag, line)
    settings = config.checkpoint
    if settings.save is not None and settings.run_dir == named and "run_dir" not in line.values:
        settings.run_dir = settings.save  # Megatron's users give this folder alone
    notes, problems = take_over(config, line.given, world_size)
    line.translated += notes
    line.problems += problems
    locate(config, FIELDS.values())
    return config, line


def from_dict(tree: dict[str, Any], source: str) -> RunConfig:
    """The configuration of a nested dict, as `to_dict` returns it.

    Raises:
        ConfigError: unknown keys, wrong types, values out of their range.
    """
    config = RunConfig()
    line = CommandLine()
    _apply_tree(config, tree, source, line)
    if line.problems:
        raise together(line.problems)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain dict: group -> field -> value."""
    return dataclasses.asdict(config)


def dump_yaml(config: RunConfig, groups: Sequence[str] | None = None) -> str:
    """The configuration, or some groups of it, as YAML that `load_config` reads back."""
    tree = to_dict(config)
    _require_yaml()
    return yaml.safe_dump({name: tree[name] for name in groups or tree}, sort_keys=False)


# No configuration that a person writes comes near these.
MAX_YAML_BYTES = 1 << 20
MAX_KEYS = 10_000
MAX_BASES = 20
MAX_PROBLEMS = 50


class _StrictLoader(SafeLoader):
    """YAML without silent overrides: keys are text, each once, and no merge makes them many."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key is a {key_node.id}, expected a name")
            if key_node.value in seen:
                raise ConfigError(f"key {shown(key_node.value)} is given twice (line {line})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_KEYS:
            raise ConfigError(f"line {node.start_mark.line + 1}: more than {MAX_KEYS} keys")


# In YAML 1.1 010 is 8 and 1:30:00 is 5400. Here they are texts, read as on the command line: 10
# and no number.
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$",
    "tag:yaml.org,2002:float": r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
if yaml is not None:
    _StrictLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
        for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }
    for _tag, _pattern in _NUMBERS.items():
        _StrictLoader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+0123456789."))


def _require_yaml() -> None:
    if yaml is None:
        raise missing("yaml", "a YAML file")


def _read_yaml(path: Path) -> dict[Any, Any]:
    """The tree of a file, whatever is in its place.

    Raises:
        ConfigError: one line: cannot be read, or is no YAML of groups.
    """
    _require_yaml()
    try:
        text = read_regular(path, MAX_YAML_BYTES).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # no UTF-8; a NUL in the name
        raise ConfigError(f"--config {shown(str(path))}: cannot be read: {error}") from None
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deep") from None
    except Exception as error:  # PyYAML lets out what its constructors meet in odd scalars
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {type(tree).__name__}, expected groups of settings")
    return tree


def _apply_yaml(
    config: RunConfig, path: Path, line: CommandLine, including: tuple[str, ...] = ()
) -> None:
    """Apply a file; `base: OTHER.yaml` (beside it) is applied first."""
    own = os.path.realpath(path)
    if own in including:
        raise ConfigError(f"{path}: includes itself by 'base'")
    if len(including) >= MAX_BASES:
        raise ConfigError(f"{path}: the {MAX_BASES}th file in a row that is a 'base' of another")
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str) or not is_text(base):
            raise ConfigError(
                f"{path}: base: found {shown(base)}, expected the name of a YAML file"
            )
        _apply_yaml(config, path.parent / base, line, (*including, own))
    _apply_tree(config, tree, str(path), line)


def _apply_tree(config: RunConfig, tree: dict[str, Any], source: str, line: CommandLine) -> None:
    group_names = [group.name for group in dataclasses.fields(RunConfig)]
    for group, section in tree.items():
        if len(line.problems) >= MAX_PROBLEMS:
            return
        if group not in group_names:
            if group in FIELDS:
                hint = f", it belongs into the group {FIELDS[group].group!r}"
            else:
                close = difflib.get_close_matches(str(group), group_names, n=1)
                hint = f", did you mean {close[0]}?" if close else f", expected {group_names}"
            line.problems.append(f"{source}: unknown group {shown(group)}{hint}")
            continue
        if not isinstance(section, dict):
            line.problems.append(
                f"{source}: group {group!r} holds {shown(section)}, expected settings"
            )
            continue
        if group == "data":
            replace_sources(config, section)
        for key, value in section.items():
            if len(line.problems) >= MAX_PROBLEMS:
                return
            name = shown(key).strip("'")
            info = FIELDS.get(ALIASES.get(name, name))
            if info is None:
                near = nearest_field(name)
                line.problems.append(f"{source}: unknown key {group}.{name}{near}")
            elif info.group != group:
                line.problems.append(
                    f"{source}: unknown key {group}.{key}, did you mean {info.group}.{key}?"
                )
            else:
                _assign(config, info, value, f"{source}: {group}.{key}", line)


def _assign(config: RunConfig, info: FieldInfo, value: Any, source: str, line: CommandLine) -> None:
    line.given.add(info.name)
    try:
        setattr(getattr(config, info.group), info.name, convert(info, value, source))
    except ConfigError as error:
        line.problems.append(str(error))
