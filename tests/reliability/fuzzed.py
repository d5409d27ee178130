"""Good inputs, damaged by hypothesis: each is read, or refused in one line by an error of ours.

Bytes are exchanged, values and keys of JSON and YAML replaced by odd ones, and files of a model's
folder deleted, truncated, exchanged, and replaced by links, folders, pipes and devices.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from megasparse.errors import MegasparseError
from tools import convert_checkpoint

MAX_SECONDS = 20  # for one input
ODD_BYTES = [b"", b"\0", b"\xff\xfe", b"[" * 3000, b"{" * 3000, b"9" * 5000, b"1e999"]
ODD_VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.0, 1e-300,
    float("nan"), float("inf"), "", "0", "\0", "nan", "..", "/", "~", "/dev/zero", "x" * 5000,
    [], {}, [[]], [None], {"": None}, [1, 2, 3], {"a": {"b": [1]}}, [[[[[[[[[[0]]]]]]]]]],
]  # fmt: skip
_edit = st.tuples(
    st.integers(0, 1 << 20), st.integers(0, 64), st.binary(max_size=8) | st.sampled_from(ODD_BYTES)
)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Up to four places of a file exchanged."""
    for place, length, insert in draw(st.lists(_edit, max_size=4)):
        start = place % (len(content) + 1)
        content = content[:start] + insert + content[start + length :]
    return content


@st.composite
def odd_tree(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of lists and mappings with one to three values or keys replaced, copied or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["value", "value", "value", "key", "remove", "swap"]))
        if action == "value":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif action == "swap":
            other, there = draw(st.sampled_from(places))
            mine, theirs = copy.deepcopy(holder[key]), copy.deepcopy(other[there])
            other[there], holder[key] = mine, theirs
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(["", "\0", "..", "x" * 300, f"{key} "]))] = holder.pop(key)
    return tree


def _places(tree: Any) -> Any:
    """Every value in a tree, by what holds it and its key there."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])


def fuzz(
    kind: str,
    read: Callable[[bytes], object],
    seeds: list[bytes],
    count: int,
    seed: int,
    form: str = "json",
) -> dict[str, Any]:
    """One file, read again and again.

    Args:
        form: of the file, "json" or "yaml".

    Returns:
        Inputs, those accepted, the slowest one's seconds, and what was neither read nor refused.
    """

    @st.composite
    def content(draw: st.DrawFn) -> bytes:
        good = draw(st.sampled_from(seeds))
        if draw(st.booleans()):
            return draw(damaged_bytes(good))
        tree = draw(odd_tree(yaml.safe_load(good)))
        text = json.dumps(tree) if form == "json" else yaml.safe_dump(tree)
        return text.encode()

    return _many(kind, content(), read, count, seed)


def fuzz_folders(folders: dict[str, Path], root: Path, count: int, seed: int) -> dict[str, Any]:
    """Whole model folders as the input of conversions, damaged in one to three files.

    Args:
        folders: good ones by the kind that `--from` names, and a number.
        root: for the copies, and what is written.

    Returns:
        As `fuzz`.
    """
    damaged, output = root / "damaged", root / "output"

    @st.composite
    def folder(draw: st.DrawFn) -> str:
        name = draw(st.sampled_from(sorted(folders)))
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(folders[name], damaged)
        for _ in range(draw(st.integers(1, 3))):
            files = sorted(p for p in damaged.rglob("*") if p.is_file() and not p.is_symlink())
            if files:
                _damage(draw, draw(st.sampled_from(files)), files)
        return name.split()[0]

    def read(source: str) -> None:
        target = "huggingface" if source == "megasparse" else "megasparse"
        flags = ["--from", source, "--to", target, "--input", str(damaged), "--output", str(output)]
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = convert_checkpoint.main(flags)
        left = sorted(path.name for path in root.iterdir() if path != damaged)
        assert left == (["output"] if code == 0 else []), f"exit code {code} left {left}"
        if code:
            lines = [line for line in told.getvalue().splitlines() if "error: " in line]
            assert len(lines) == 1 and 64 <= code <= 77, (code, lines)
            raise MegasparseError(lines[0])

    return _many("conversion", folder(), read, count, seed)


def _damage(draw: st.DrawFn, path: Path, files: list[Path]) -> None:
    """One file of a folder, damaged or replaced."""
    content = path.read_bytes()
    actions = ["bytes", "empty", "truncate", "remove", "replace", "swap"]
    tree, before, after = _tree_of(path, content)
    if tree:
        actions += ["tree"] * 6
    action = draw(st.sampled_from(actions))
    if action == "tree":
        header = json.dumps(draw(odd_tree(tree))).encode()
        before = len(header).to_bytes(8, "little") if before else b""
        path.write_bytes(before + header + after)
    elif action == "bytes":
        path.write_bytes(draw(damaged_bytes(content)))
    elif action in ("empty", "truncate"):
        os.truncate(path, 0 if action == "empty" else draw(st.integers(0, len(content))))
    elif action == "swap":
        path.write_bytes(draw(st.sampled_from(files)).read_bytes())
    else:
        path.unlink()
        if action == "replace":
            draw(st.sampled_from(REPLACEMENTS))(path)


def _tree_of(path: Path, content: bytes) -> tuple[Any, bytes, bytes]:
    """The JSON of a file, or of the header of one of tensors, with what is around it."""
    before, after = b"", b""
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        before, content, after = content[:8], content[8:end], content[end:]
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):  # it was damaged before
        tree = None
    return (tree if isinstance(tree, dict) else None), before, after


REPLACEMENTS: list[Callable[[Path], object]] = [
    lambda path: path.mkdir(),
    lambda path: os.mkfifo(path),
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/etc/hostname"),
    lambda path: path.symlink_to("missing"),
]


def _many(
    kind: str, inputs: st.SearchStrategy, read: Callable[[Any], object], count: int, seed: int
) -> dict[str, Any]:
    result: dict[str, Any] = {"inputs": 0, "accepted": 0, "slowest": 0.0, "wrong": []}

    @hypothesis_seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(content: Any) -> None:
        begin = time.monotonic()
        result["inputs"] += 1
        signal.alarm(MAX_SECONDS)
        try:
            read(content)
            result["accepted"] += 1
        except MegasparseError as error:
            if "\n" in str(error) or len(str(error)) > 2000:
                result["wrong"].append(f"{kind}: {str(error)[:200]!r}")
        except Exception as error:  # what a user would see as a traceback
            result["wrong"].append(f"{kind}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.alarm(0)
        result["slowest"] = max(result["slowest"], round(time.monotonic() - begin, 2))

    previous = signal.signal(signal.SIGALRM, _too_long)
    try:
        one()
    finally:
        signal.signal(signal.SIGALRM, previous)
    return result


def _too_long(*_: object) -> None:
    raise AssertionError(f"no end after {MAX_SECONDS} s")
