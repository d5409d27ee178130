"""A command line read as settings: our flags, and Megatron's by the table of `flags/table.py`.

Nothing is raised here. All that is wrong is collected, so that it is told at once, and so is what
becomes of flags of Megatron-LM and Megatron-DeepSpeed that are not flags here.
"""

from __future__ import annotations

import argparse
import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megasparse.config.fields import ALIASES, FIELDS, FieldInfo, expected
from megasparse.config.flags.megatron import VALUES
from megasparse.config.flags.table import Row, family, rows
from megasparse.config.schema import RunConfig
from megasparse.errors import EXIT_CODES

# Questions that `megasparse.preflight.plan` answers instead of a run.
QUESTIONS = {
    "--version": "print the versions of megasparse and of what it stands on",
    "--print-config": "print every setting as YAML, defaults filled in",
    "--dry-run": "check everything, print sizes, layout and memory; nothing is written",
}
# Beside the fields: given by launchers, or read before the fields are.
_OF_LAUNCHERS = ("--local_rank", "--local-rank")
_BOTH_SPELLINGS = {"deepspeed_config": "--deepspeed_config"}  # as DeepSpeed spells it


@dataclass
class CommandLine:
    """What the words of a command line say.

    Attributes:
        configs: YAML files of `--config`.
        values: field -> value as typed; flags of ours win over translated ones.
        translated: "FLAG becomes FLAGS (why)", of each such flag.
        nothing_to_do: flags that are accepted without effect.
        problems: what is wrong, one line each.
        given: fields that YAML files or flags set.
    """

    configs: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    translated: list[str] = field(default_factory=list)
    nothing_to_do: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)


def read(argv: Sequence[str]) -> CommandLine:
    """The settings of a command line, without the program's name."""
    line = CommandLine()
    translated: list[str] = []
    for flag, values in _flags(argv, line):
        if flag == "--config":
            line.configs += _exactly_one(line, flag, values, "a YAML file")
        elif flag not in _OF_LAUNCHERS and not _own(line, flag, values):
            translated += _foreign(line, flag, values)
    explicit, line.values = line.values, {}
    for flag, values in _flags(translated, line):
        _own(line, flag, values)
    line.values |= explicit
    return line


def build_parser() -> argparse.ArgumentParser:
    """All flags by group, for `--help`."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description="Pre-train a Transformer language model with 2:4 sparse linear layers.",
        epilog="Values: defaults < --config FILES < flags. Flags of Megatron-LM and "
        f"Megatron-DeepSpeed: docs/megatron.md. Exit codes: {EXIT_CODES}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML file, e.g. configs/quickstart.yaml; may be repeated, later files win "
        "(one of configs/models, one of configs/recipes)",
    )
    for flag, text in QUESTIONS.items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks that the two above plan for")
    groups: dict[str, Any] = {}
    for info in FIELDS.values():
        if info.group not in groups:
            groups[info.group] = parser.add_argument_group(info.group)
        groups[info.group].add_argument(
            *_spellings(info), dest=info.name, default=argparse.SUPPRESS, **_argument(info)
        )
    return parser


def completion_words() -> list[str]:
    """Every flag of ours, for a shell's completion."""
    return sorted([*_known(), *QUESTIONS, "--config", "--gpus", "--help"])


def _flags(argv: Sequence[str], line: CommandLine) -> list[tuple[str, list[str]]]:
    """Flags with the words that follow each."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            line.problems.append(f"unexpected argument {word!r}, expected a flag")
    return found


def _own(line: CommandLine, flag: str, values: list[str]) -> bool:
    """Take a flag of ours; False: it is none."""
    info = _known().get(flag)
    if info is None:
        return False
    if info.kind is bool:
        _refuse_values(line, flag, values)
        line.values[info.name] = not (flag.startswith("--no-") and flag != info.flag)
    elif info.kind is list:
        line.values[info.name] = values
    else:
        for value in _exactly_one(line, flag, values, expected(info)):
            line.values[info.name] = VALUES.get(flag, {}).get(value, value)
    return True


def _foreign(line: CommandLine, flag: str, values: list[str]) -> list[str]:
    """Account for a flag of Megatron's; the flags of ours that it becomes."""
    row = next((row for row in rows().get(flag, ()) if row.holds(values)), None)
    if row is None and flag in rows():
        allowed = [value for row in rows()[flag] for value in row.only]
        line.problems.append(f"{_shown(flag, values)}: expected one of {', '.join(allowed)}")
    elif row is None and (why := family(flag)) is not None:
        line.problems.append(f"{_shown(flag, values)} is not supported: {why}")
    elif row is None:
        line.problems.append(f"unknown flag {flag}{_nearest(flag)}")
    elif row.missing:
        line.problems.append(f"{_shown(flag, values)} is not supported: {row.says}")
    elif _fits(line, row, values) and row.becomes is not None:
        becomes = row.becomes.format(*values)
        line.translated.append(f"{_shown(flag, values)} becomes {becomes} ({row.says})")
        return becomes.split(" ")
    elif flag not in line.nothing_to_do:
        line.nothing_to_do.append(flag)
    return []


def _fits(line: CommandLine, row: Row, values: list[str]) -> bool:
    """Whether a flag has as many values as it takes; else that is a problem."""
    if row.takes == "1":
        return bool(_exactly_one(line, row.flag, values, "a value"))
    return row.takes == "*" or _refuse_values(line, row.flag, values)


def _exactly_one(line: CommandLine, flag: str, values: list[str], wanted: str) -> list[str]:
    if not values:
        line.problems.append(f"{flag}: found no value, expected {wanted}")
    elif len(values) > 1:
        line.problems.append(f"unexpected argument {values[1]!r} after {flag} {values[0]}")
    return values[:1]


def _refuse_values(line: CommandLine, flag: str, values: list[str]) -> bool:
    if values:
        line.problems.append(f"unexpected argument {values[0]!r} after {flag}, which has no value")
    return not values


def _shown(flag: str, values: list[str]) -> str:
    return " ".join([flag, *values])


def _nearest(flag: str) -> str:
    matches = difflib.get_close_matches(
        flag, [*_known(), *rows(), *QUESTIONS, "--gpus", "--config"], n=1, cutoff=0.6
    )
    return f", did you mean {matches[0]}?" if matches else ""


@functools.cache
def _known() -> dict[str, FieldInfo]:
    """Every spelling of a flag of ours, also that which turns it off."""
    known = {}
    for info in FIELDS.values():
        for flag in _spellings(info):
            known[flag] = info
            if info.kind is bool:
                known["--no-" + flag[2:]] = info
    return known


def _spellings(info: FieldInfo) -> list[str]:
    spelt = [info.flag]
    spelt += ["--" + a.replace("_", "-") for a, target in ALIASES.items() if target == info.name]
    if info.name in _BOTH_SPELLINGS:
        spelt.insert(0, _BOTH_SPELLINGS[info.name])
    return spelt


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
