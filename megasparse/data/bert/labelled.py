"""Texts with classes: JSON lines of `{"text": ..., "label": ...}`, whole in memory.

Classes are the labels of the training texts, in the order of their names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megasparse.config import ResolvedConfig
from megasparse.data.file_errors import read_error
from megasparse.errors import DataError
from megasparse.input_files import read_regular

_MAX_BYTES = 1 << 32
_SHOWN = 5  # names of classes in a message


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, and the number of each one's class."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Classes:
    """What a run tells apart.

    Attributes:
        names: of the classes, by their number.
        splits: "train", and "valid" if there is one.
    """

    names: tuple[str, ...]
    splits: dict[str, LabelledTexts]

    @property
    def digests(self) -> dict[str, str]:
        """To be kept with the run."""
        found = {f"{split}.classes": texts.digest for split, texts in self.splits.items()}
        names = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()
        return {**found, "names.classes": names}


def read_classes(config: ResolvedConfig) -> Classes:
    """The texts of a run.

    Raises:
        DataError: a file cannot be read, a line is not as it should be, there are not as many
            classes as `--num-classes`, or validation texts have others.
    """
    settings, count = config.bert, config.model.num_classes
    assert settings.train_data is not None
    train, digest = _read(Path(settings.train_data))
    names = tuple(sorted({label for _, label in train}))
    if len(names) != count:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise DataError(
            f"{settings.train_data}: found {len(names)} labels ({shown}), expected num_classes "
            f"{count}"
        )
    splits = {"train": _numbered(train, names, digest, settings.train_data)}
    if settings.valid_data is not None:
        rows, digest = _read(Path(settings.valid_data))
        splits["valid"] = _numbered(rows, names, digest, settings.valid_data)
    return Classes(names, splits)


def _numbered(
    rows: list[tuple[str, str]], names: tuple[str, ...], digest: str, where: str
) -> LabelledTexts:
    numbers = {name: number for number, name in enumerate(names)}
    for line, (_, label) in enumerate(rows, 1):
        if label not in numbers:
            raise DataError(f"{where}: line {line}: label {label!r} is none of the training texts'")
    texts, labels = zip(*rows, strict=True)
    return LabelledTexts(texts, tuple(numbers[label] for label in labels), digest)


def _read(path: Path) -> tuple[list[tuple[str, str]], str]:
    """(text, label) of each line, and the file's SHA-256."""
    try:
        data = read_regular(path, _MAX_BYTES)
    except OSError as error:
        raise read_error(path, error) from error
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row["text"], row["label"]
            right = isinstance(text, str) and type(label) in (str, int)
        except (ValueError, KeyError, TypeError, RecursionError):
            right = False
        if not right:
            raise DataError(
                f'{path}: line {number}: expected {{"text": a string, "label": a string or a '
                "number}"
            )
        rows.append((text, str(label)))
    if not rows:
        raise DataError(f"{path}: found no text")
    return rows, hashlib.sha256(data).hexdigest()
