"""Small real conversations that are on every machine: what functions of Python's library do.

A public function of the standard library with a docstring is one record: a user asks for it by
name, the assistant answers with the first sentence. Enough to see a small model learn to answer
without any download.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megasparse.atomic_files import replacing
from megasparse.data.corpus import source_files
from megasparse.errors import DataError


def conversations(root: Path) -> Iterator[dict[str, object]]:
    """Records of the sources below `root`, in an order that depends on their names only."""
    found = {}
    for path in source_files(root):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                sentence = _first_sentence(ast.get_docstring(node) or "")
                if sentence:
                    found[f"{module}.{node.name}"] = sentence
    for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield {
            "messages": [
                {"role": "user", "content": f"What does {name} do?"},
                {"role": "assistant", "content": found[name]},
            ]
        }


def write_conversations(output: Path, limit: int | None = None, root: Path | None = None) -> int:
    """Write the records to `output`, one JSON object a line; how many there are.

    Args:
        output: the JSONL file; it appears only when it is whole.
        limit: at most so many.
        root: where the sources are, the running Python's standard library unless given.

    Raises:
        DataError: no function was found, or `output` cannot be written.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    count = 0
    with replacing(output, DataError) as stream:
        for record in conversations(root):
            if count == limit:
                break
            stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
            count += 1
        if not count:
            raise DataError(f"{root}: found no public function with a docstring")
    return count


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".") + "." if paragraph else ""
