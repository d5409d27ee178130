"""What pre-processing was asked for, and the manifest of what it read and wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import megasparse
from megasparse.atomic_files import write_json
from megasparse.data.chat.template import ChatTemplate
from megasparse.data.inputs import STDIN, Source
from megasparse.data.sidecar import Sidecar
from megasparse.data.tokenizers.special_tokens import BY_THE_FILES, TokenOptions
from megasparse.data.tokenizers.tokenizer import Tokenizer, token_rules

ERROR, SKIP = "error", "skip"
ON_BAD_LINE = (ERROR, SKIP)


@dataclass(frozen=True)
class PreprocessOptions:
    """What `preprocess` is asked for; the names are those of Megatron's flags.

    Attributes:
        input: files, folders and pipes, read in this order; `-` is standard input.
        output_prefix: `<output_prefix>_<key>_document` is the dataset of each key.
        tokenizer_model: path as `load_tokenizer` takes it.
        tokenizer_type: to insist on a type; inferred when None.
        tokens: which tokens begin and end a document.
        json_keys: keys of the texts.
        append_eod: end each document with the tokenizer's end-of-document token.
        workers: number of processes that tokenize; 1 does it in this process.
        overwrite: replace existing outputs.
        on_bad_line: "error" ends the work at the first line (or row) that holds no text, or no
            conversation that the template takes, "skip" leaves it out and counts it.
        sft: documents are conversations, under the one key.
        chat_template: file of another template than the tokenizer's own.
    """

    input: tuple[Path, ...]
    output_prefix: str
    tokenizer_model: Path
    tokenizer_type: str | None = None
    tokens: TokenOptions = BY_THE_FILES
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = True
    workers: int = 1
    overwrite: bool = False
    on_bad_line: str = ERROR
    sft: bool = False
    chat_template: Path | None = None


@dataclass
class BadLines:
    """Lines that were skipped: how many of each input, and the first ones with their places."""

    of_input: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PreprocessSummary:
    """One dataset that `preprocess` wrote.

    Attributes:
        num_empty: documents that had no token and were left out.
        bad: lines that were skipped, the same for all datasets.
    """

    prefix: str
    sidecar: Sidecar
    num_empty: int
    bad: BadLines


def manifest_path(output_prefix: str) -> Path:
    """Name of the file that says what was read."""
    return Path(f"{output_prefix}_manifest.json")


def write_manifest(
    options: PreprocessOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    sources: Sequence[Source],
    summaries: Sequence[PreprocessSummary],
) -> None:
    """Write what was read, by what, into which datasets."""
    bad = summaries[0].bad
    inputs = [
        {
            "path": str(s.path if s.path == STDIN else s.path.absolute()),
            "kind": s.kind,
            "bytes": s.num_bytes,
            "sha256": s.sha256,
            "records": s.records,
            "bad": bad.of_input[str(s.path)],
        }
        for s in sources
    ]
    tokens = {"type": tokenizer.tokenizer_type, "sha256": tokenizer.digest}
    chat = None if template is None else {"file": template.where, "sha256": template.digest}
    content = {
        "format": 1,
        "inputs": inputs,
        "bad_lines": {"count": bad.of_input.total(), "first": bad.first},
        "tokenizer": {"file": str(options.tokenizer_model.absolute()), **tokens},
        "tokens": {
            **token_rules(tokenizer),
            "append_eod": options.append_eod and not options.sft,
        },
        "chat_template": chat,
        "datasets": {
            s.prefix: {"documents": s.sidecar.num_documents, "empty": s.num_empty}
            for s in summaries
        },
        "megasparse": megasparse.__version__,
    }
    write_json(manifest_path(options.output_prefix), content, indent=1)
