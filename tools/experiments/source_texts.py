"""Texts made of the packages that this Python has: a corpus, and pieces of it with their package.

The packages with most source text are taken. Lines that name one of them, or import something, are
left out of the pieces: they would give the answer away. Files of validation pieces are in no other
split, and not in the corpus.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megasparse.atomic_files import write_text
from megasparse.errors import ConfigError

LINES, MIN_CHARACTERS = 12, 200  # of a piece
MAX_FILE = 100_000  # characters
VALID_EVERY = 5  # one file of so many is for validation


@dataclass(frozen=True)
class Sources:
    """What was made.

    Attributes:
        packages: names with their versions, the classes.
        corpus, train, valid: JSON lines.
        pieces: of train and of valid.
    """

    packages: list[str]
    corpus: Path
    train: Path
    valid: Path
    pieces: tuple[int, int]


def make_texts(
    output: Path, classes: int, train: int, valid: int, corpus_characters: int, seed: int
) -> Sources:
    """Write corpus.jsonl, train.jsonl and valid.jsonl.

    Args:
        classes: packages to tell apart.
        train, valid: pieces of each package.
        corpus_characters: of each package, at most.

    Raises:
        ConfigError: there are not so many packages with enough text.
    """
    draw = random.Random(seed)
    chosen = _largest(Path(sysconfig.get_paths()["purelib"]), 3 * classes)
    rows: dict[str, list[dict[str, str]]] = {"corpus": [], "train": [], "valid": []}
    found: list[str] = []
    names = [package.name.lower() for package in chosen]
    for package in chosen:
        if len(found) == classes:
            break
        files = [text for path in sorted(package.rglob("*.py")) if (text := _text(path))]
        draw.shuffle(files)
        held, rest = files[::VALID_EVERY], [f for n, f in enumerate(files) if n % VALID_EVERY]
        pieces = {"train": _pieces(rest, names, train), "valid": _pieces(held, names, valid)}
        if len(pieces["train"]) < train or len(pieces["valid"]) < valid:
            continue
        found.append(package.name)
        size = 0
        for text in rest:
            if size < corpus_characters:
                rows["corpus"].append({"text": text})
                size += len(text)
        for split, texts in pieces.items():
            rows[split] += [{"text": text, "label": package.name} for text in texts]
    if len(found) < classes:
        raise ConfigError(
            f"found {len(found)} packages with enough source text, expected {classes}"
        )
    for name, lines in rows.items():
        draw.shuffle(lines)
        write_text(output / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    corpus, learned, tested = (output / f"{name}.jsonl" for name in rows)
    counts = len(rows["train"]), len(rows["valid"])
    return Sources(_versions(found), corpus, learned, tested, counts)


def _largest(folder: Path, count: int) -> list[Path]:
    """Packages by the size of their sources, largest first."""
    packages = [path for path in sorted(folder.iterdir()) if (path / "__init__.py").is_file()]
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*.py")) for path in packages}
    return sorted(packages, key=lambda path: -sizes[path])[:count]


def _text(path: Path) -> str:
    """A file's text; "" of one that is too large or is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return text if len(text) <= MAX_FILE else ""


def _pieces(files: Iterable[str], names: list[str], count: int) -> list[str]:
    """One piece of the middle of each file until there are enough."""
    found = []
    for text in files:
        kept = [line for line in text.splitlines() if line.strip() and not _tells(line, names)]
        middle = max((len(kept) - LINES) // 2, 0)
        piece = "\n".join(kept[middle : middle + LINES])
        if len(piece) >= MIN_CHARACTERS:
            found.append(piece)
        if len(found) == count:
            break
    return found


def _tells(line: str, names: list[str]) -> bool:
    """Whether a line imports something, or names a package."""
    lower = line.lower()
    return lower.lstrip().startswith(("import ", "from ")) or any(name in lower for name in names)


def _versions(packages: list[str]) -> list[str]:
    owners = importlib.metadata.packages_distributions()
    return [
        f"{name} {importlib.metadata.version(owners[name][0])}" if name in owners else name
        for name in packages
    ]
