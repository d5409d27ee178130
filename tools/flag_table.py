"""Write the table of Megatron's and Megatron-DeepSpeed's flags into a page of the documentation.

    python tools/flag_table.py docs/megatron.md

Replaces what stands between the page's two marks, by the table that the parser follows.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from megasparse.atomic_files import write_text
from megasparse.cli import guarded, markdown_table
from megasparse.config.fields import ALIASES, FIELDS
from megasparse.config.flags.megatron import VALUES
from megasparse.config.flags.missing import FAMILIES
from megasparse.config.flags.table import OURS_ALONE, Row, rows
from megasparse.errors import ConfigError

BEGIN, END = "<!-- flags: begin -->", "<!-- flags: end -->"


def table() -> str:
    """The four parts of the table as Markdown."""
    every = [row for found in rows().values() for row in found]
    translated = [row for row in every if row.becomes is not None]
    idle = [row for row in every if row.becomes is None and not row.missing]
    missing = [row for row in every if row.missing]
    lines = ["### The same", "", *markdown_table(("group", "flags"), _same(), 2), ""]
    lines += ["### Translated", ""]
    cells = [(_shown(row), f"`{row.becomes}`", row.says) for row in translated]
    values = [
        (f"`{flag} {theirs}`", f"`{flag} {ours}`", "another name of the value")
        for flag, spelt in VALUES.items()
        for theirs, ours in spelt.items()
    ]
    aliases = [(f"`{_flag(name)}`", f"`{_flag(field)}`", "") for name, field in ALIASES.items()]
    header = ("yours", "becomes", "why")
    lines += [*markdown_table(header, [*cells, *values, *aliases], 3), ""]
    lines += ["### Nothing to do here", "", *_reasons(("accepted, because", "flags"), idle), ""]
    lines += ["### Missing", "", *_reasons(("refused; what there is instead", "flags"), missing)]
    families = [(f"`{start}...`", says) for start, says in FAMILIES]
    lines += ["", "Of newer versions, every other flag that begins so is missing too:", ""]
    lines += markdown_table(("begins with", "what there is instead"), families, 2)
    return "\n".join(lines)


def _same() -> list[tuple[str, str]]:
    same = [info for info in FIELDS.values() if info.name not in OURS_ALONE]
    groups = itertools.groupby(same, lambda info: info.group)
    return [(group, " ".join(f"`{i.flag}`" for i in found)) for group, found in groups]


def _reasons(header: tuple[str, str], found: list[Row]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for row in found:
        by_reason.setdefault(row.says, []).append(_shown(row))
    return markdown_table(header, [(says, " ".join(f)) for says, f in by_reason.items()], 2)


def _shown(row: Row) -> str:
    values = " or ".join(row.only)
    return f"`{row.flag} {values}`" if values else f"`{row.flag}`"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def with_table(page: str) -> str:
    """A page with the table between its marks.

    Raises:
        ConfigError: it has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"found no {BEGIN} and {END}, expected both")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="Markdown file with the two marks")
    args = parser.parse_args()
    write_text(args.page, with_table(args.page.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("flag_table", main))
