"""Text for runs in which nothing repeats: sources, headers and documents that lie on a machine.

    python -m tools.experiments.machine_texts --output runs/recipes_10m --workers 16

Below /usr, /opt and this Python's folders every file with a suffix of SUFFIXES is taken once: what
is no UTF-8, too short, too long or mostly figures is left out, and so is a copy of a file that was
taken. Files that differ in little (two versions of one header) are both taken. The same machine
image gives the same bytes, with any number of workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megasparse.atomic_files import replacing
from megasparse.cli import guarded
from megasparse.errors import DataError

SUFFIXES = (
    ".py", ".pyi", ".pyx", ".pxd", ".c", ".cc", ".cpp", ".cxx", ".cu", ".h", ".hh", ".hpp", ".hxx",
    ".cuh", ".inl", ".ipp", ".tcc", ".def", ".rs", ".go", ".js", ".ts", ".java", ".f", ".f90",
    ".pl", ".pm", ".pod", ".sh", ".cmake", ".m4", ".tcl", ".el", ".md", ".rst", ".txt", ".tex",
    ".html",
)  # fmt: skip
MIN_BYTES, MAX_BYTES = 256, 500_000  # of a file
MIN_LETTERS = 0.4  # of a file's bytes; tables of numbers have fewer
PARTS = 32  # files of text, so that as many processes read and write


def roots() -> list[Path]:
    """Folders that are searched, none inside another."""
    named = ["/usr", "/opt", sys.prefix, sys.base_prefix]
    found = {Path(name).resolve() for name in named if Path(name).is_dir()}
    return sorted(path for path in found if not found.intersection(path.parents))


def text_files(folders: Sequence[Path]) -> list[tuple[str, int]]:
    """Names and bytes of the files that may be taken; links are not followed.

    Many threads look into folders at a time, for a disk that was not read yet answers slowly.
    """
    found: list[tuple[str, int]] = []
    with ThreadPoolExecutor(PARTS) as pool:
        level = [str(folder) for folder in folders]
        while level:
            answers = list(pool.map(_look_into, level))
            found += [file for files, _ in answers for file in files]
            level = [folder for _, folders in answers for folder in folders]
    return found


def _look_into(folder: str) -> tuple[list[tuple[str, int]], list[str]]:
    """The files that may be taken, and the folders, of one folder."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    size = entry.stat(follow_symlinks=False).st_size
                    if entry.is_file(follow_symlinks=False) and MIN_BYTES <= size <= MAX_BYTES:
                        files.append((entry.path, size))
    except OSError:  # not for us to read, or gone
        pass
    return files, folders


def read_text(path: str) -> bytes | None:
    """A file's UTF-8 text; None: it is none, or mostly figures."""
    try:
        content = Path(path).read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    letters = sum(map(content.count, b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    return content if b"\0" not in content and letters >= MIN_LETTERS * len(content) else None


def _write_part(output: Path, paths: Sequence[str], max_bytes: int) -> tuple[int, int]:
    """One part; its documents and bytes."""
    taken: set[bytes] = set()
    size = 0
    with replacing(output, DataError) as stream:
        for path in paths:
            content = read_text(path)
            digest = b"" if content is None else hashlib.sha256(content).digest()
            if content is None or digest in taken or size + len(content) > max_bytes:
                continue
            taken.add(digest)
            size += len(content)
            line = json.dumps({"text": content.decode("utf-8")}, ensure_ascii=False)
            stream.write(line.encode("utf-8") + b"\n")
    return len(taken), size


def write_parts(output: Path, folders: Sequence[Path], max_bytes: int, workers: int) -> list[Path]:
    """Write machine-00.jsonl and so on, at most `max_bytes` of text in all; their paths.

    Copies have one size, and all files of a size are in one part, so that each part finds its own
    copies. The order within is that of the names' SHA-256, not of folders.

    Raises:
        DataError: nothing was found, or a file cannot be written.
    """
    groups: list[list[str]] = [[] for _ in range(PARTS)]
    for path, size in text_files(folders):
        draw = hashlib.sha256(str(size).encode()).digest()
        groups[int.from_bytes(draw[:4], "big") % PARTS].append(path)
    parts = [output / f"machine-{number:02d}.jsonl" for number in range(PARTS)]
    tasks = [
        (part, sorted(group, key=lambda path: hashlib.sha256(os.fsencode(path)).digest()))
        for part, group in zip(parts, groups, strict=True)
    ]
    write = partial(_write_part, max_bytes=max_bytes // PARTS)
    with multiprocessing.get_context("spawn").Pool(min(workers, PARTS)) as pool:
        counts = pool.starmap(write, tasks, chunksize=1)
    documents, size = (sum(column) for column in zip(*counts, strict=True))
    if not documents:
        raise DataError(f"{', '.join(map(str, folders))}: found no text")
    print(f"{output}: {documents:,} documents, {size / 1e6:,.0f} MB of text")
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--max-bytes", type=int, default=2_000_000_000, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--roots", type=Path, nargs="+", help="folders in place of the machine's")
    args = parser.parse_args(argv)

    def run() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_parts(args.output, args.roots or roots(), args.max_bytes, args.workers)

    return guarded("machine_texts.py", run)


if __name__ == "__main__":
    sys.exit(main())
