"""Defaults < YAML files (each with its `base`) < flags, strictly: unknown keys are errors.

A `RunConfig` is built from three sources, each overriding the one before. Errors name the key, what
was found, what was expected and, for an unknown name, the nearest valid one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megasparse.config.inputs import FieldInfo, locate, replace_sources
from megasparse.config.schema import RunConfig
from megasparse.errors import EXIT_CODES, ConfigError

# Other spellings that Megatron-DeepSpeed and Megatron users type.
ALIASES = {"num_key_value_heads": "num_query_groups"}


def fields() -> Iterator[FieldInfo]:
    """All fields of all groups, in order."""
    for group in dataclasses.fields(RunConfig):
        section = typing.cast(Any, group.default_factory)
        hints = typing.get_type_hints(section)
        for item in dataclasses.fields(section):
            hint, optional = hints[item.name], False
            if typing.get_origin(hint) in (typing.Union, types.UnionType):
                (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
                optional = True
            kind = typing.get_origin(hint) or hint
            yield FieldInfo(group.name, item.name, kind, optional, dict(item.metadata))


FIELDS = {info.name: info for info in fields()}


def load_config(argv: Sequence[str], yaml_path: str | None = None) -> RunConfig:
    """The configuration of `defaults < --config FILE < --config FILE < ... < flags`.

    `run_dir` is `runs/` and the files' names, joined by `_`, unless a file or a flag sets it.

    Args:
        argv: flags, without the program's name. Every `--config FILE` names a YAML file, later ones
            win; `--local_rank N` (DeepSpeed's launcher adds it) is accepted and ignored.
        yaml_path: used when argv has no `--config`.

    Raises:
        ConfigError: unknown key or flag, wrong type, value out of its range.
    """
    parsed, flags = _parse_flags(argv)
    paths = [Path(path) for path in parsed.config or [yaml_path] if path is not None]
    config = RunConfig()
    if paths:
        config.checkpoint.run_dir = "runs/" + "_".join(path.stem for path in paths)
    for path in paths:
        _apply_yaml(config, path)
    replace_sources(config, flags)
    for name, value in flags.items():
        _assign(config, FIELDS[name], value, source=FIELDS[name].flag)
    locate(config, FIELDS.values())
    return config


def from_dict(tree: dict[str, Any], source: str) -> RunConfig:
    """The configuration of a nested dict, as `to_dict` returns it."""
    config = RunConfig()
    _apply_tree(config, tree, source)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain dict: group -> field -> value."""
    return dataclasses.asdict(config)


def dump_yaml(config: RunConfig, groups: Sequence[str] | None = None) -> str:
    """The configuration, or some groups of it, as YAML that `load_config` reads back."""
    tree = to_dict(config)
    return yaml.safe_dump({name: tree[name] for name in groups or tree}, sort_keys=False)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all flags; `--help` shows them by group."""
    parser = _Parser(
        prog="pretrain.py",
        description="Pre-train a Transformer language model with 2:4 sparse linear layers.",
        epilog=f"Values: defaults < --config FILES < flags. Exit codes: {EXIT_CODES}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML file, e.g. configs/quickstart.yaml; may be repeated, later files win "
        "(one of configs/models, one of configs/recipes)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    aliases = {target: alias for alias, target in ALIASES.items()}
    for info in FIELDS.values():
        if info.group not in groups:
            groups[info.group] = parser.add_argument_group(info.group)
        flags = [info.flag]
        if info.name in aliases:
            flags.append("--" + aliases[info.name].replace("_", "-"))
        if info.name == "deepspeed_config":
            flags.insert(0, "--deepspeed_config")  # as DeepSpeed spells it
        groups[info.group].add_argument(
            *flags, dest=info.name, default=argparse.SUPPRESS, **_argument(info)
        )
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse, but errors are ConfigErrors, so that every rank prints them the same way."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _argument(info: FieldInfo) -> dict[str, Any]:
    default = getattr(getattr(RunConfig(), info.group), info.name)
    shown = "" if default is None or "default" in info.metadata["help"] else f" (default {default})"
    options: dict[str, Any] = {"help": (info.metadata["help"] + shown).replace("%", "%%")}
    if info.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
        return options
    if info.kind is list:
        options["nargs"] = "*"
    options["metavar"] = info.kind.__name__.upper() if info.kind is not list else "TEXT"
    if "choices" in info.metadata:
        options["metavar"] = "{" + ",".join(str(c) for c in info.metadata["choices"]) + "}"
    return options


def _parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    parsed, unknown = build_parser().parse_known_args(list(argv))
    for token in unknown:
        name = token.lstrip("-").split("=")[0].replace("-", "_")
        if token.startswith("--"):
            raise ConfigError(f"unknown flag {token.split('=')[0]}{_nearest(name, dashes=True)}")
    if unknown:
        raise ConfigError(f"unexpected argument {unknown[0]!r}, expected a flag")
    values = {
        name: value
        for name, value in vars(parsed).items()
        if name in FIELDS  # leaves out --config and --local_rank
    }
    return parsed, values


def _nearest(name: str, dashes: bool = False) -> str:
    known = [*FIELDS, *ALIASES]
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not matches:
        return ""
    shown = "--" + matches[0].replace("_", "-") if dashes else matches[0]
    return f", did you mean {shown}?"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without silent overrides: a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"key {key_node.value!r} is given twice (line {line})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _apply_yaml(config: RunConfig, path: Path, including: tuple[Path, ...] = ()) -> None:
    """Apply a file; `base: OTHER.yaml` (beside it) is applied first."""
    if path.resolve() in including:
        raise ConfigError(f"{path}: includes itself by 'base'")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {type(tree).__name__}, expected groups of settings")
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: found {base!r}, expected the name of a YAML file")
        _apply_yaml(config, path.parent / base, (*including, path.resolve()))
    _apply_tree(config, tree, str(path))


def _apply_tree(config: RunConfig, tree: dict[str, Any], source: str) -> None:
    group_names = [group.name for group in dataclasses.fields(RunConfig)]
    for group, section in tree.items():
        if group not in group_names:
            if group in FIELDS:
                hint = f", it belongs into the group {FIELDS[group].group!r}"
            else:
                close = difflib.get_close_matches(str(group), group_names, n=1)
                hint = f", did you mean {close[0]}?" if close else f", expected {group_names}"
            raise ConfigError(f"{source}: unknown group {group!r}{hint}")
        if not isinstance(section, dict):
            raise ConfigError(f"{source}: group {group!r} holds {section!r}, expected settings")
        if group == "data":
            replace_sources(config, section)
        for key, value in section.items():
            info = FIELDS.get(ALIASES.get(str(key), str(key)))
            if info is None:
                raise ConfigError(f"{source}: unknown key {group}.{key}{_nearest(str(key))}")
            if info.group != group:
                raise ConfigError(
                    f"{source}: unknown key {group}.{key}, did you mean {info.group}.{key}?"
                )
            _assign(config, info, value, source=f"{source}: {group}.{key}")


def _assign(config: RunConfig, info: FieldInfo, value: Any, source: str) -> None:
    setattr(getattr(config, info.group), info.name, _convert(info, value, source))


def _convert(info: FieldInfo, value: Any, source: str) -> Any:
    """`value` (a YAML scalar or a flag's text) as the field's type, within its limits."""
    if value is None or (info.optional and value in ("none", "None")):
        if info.optional:
            return None
        raise ConfigError(f"{source}: found no value, expected {info.kind.__name__}")
    wrong = ConfigError(f"{source}: found {value!r}, expected {_expected(info)}")
    if info.kind is list:
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (dict, list)) or item is None for item in items):
            raise wrong
        return [str(item) for item in items]
    if info.kind is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, list) and "joined" in info.metadata:
        if any(isinstance(item, (bool, dict, list)) or item is None for item in value):
            raise wrong
        value = info.metadata["joined"].join(str(item) for item in value)
    if isinstance(value, (bool, dict, list)):
        raise wrong
    try:
        if info.kind is int and isinstance(value, float) and not value.is_integer():
            raise wrong
        converted = info.kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    limits = info.metadata
    if (
        (isinstance(converted, float) and not math.isfinite(converted))
        or ("choices" in limits and converted not in limits["choices"])
        or ("at_least" in limits and converted < limits["at_least"])
        or ("above" in limits and converted <= limits["above"])
        or ("below" in limits and converted >= limits["below"])
    ):
        raise wrong
    return converted


def _expected(info: FieldInfo) -> str:
    limits = info.metadata
    if "choices" in limits:
        return "one of " + ", ".join(str(choice) for choice in limits["choices"])
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    bounds = [
        f"{words} {limits[key]}"
        for key, words in (("at_least", "at least"), ("above", "above"), ("below", "below"))
        if key in limits
    ]
    return " ".join([names.get(info.kind, "a list of texts"), " and ".join(bounds)]).strip()
