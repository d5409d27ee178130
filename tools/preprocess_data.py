"""Tokenize text into Megatron's indexed datasets: PREFIX_KEY_document.{bin,idx,json}.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-model tokenizer.model --workers 8

Inputs are JSON lines (plain, gzip or zstd, from files, folders and pipes) and Parquet:

    python tools/preprocess_data.py --input shards/ more.jsonl.zst <(zcat old.jsonl.gz) ...

Conversations are JSON lines too, {"messages": [{"role": ..., "content": ...}, ...]}:

    python tools/preprocess_data.py --sft --input chats.jsonl --output-prefix data/chats \\
        --tokenizer-model model/tokenizer.json --workers 8

They are written in the tokenizer's own chat template; the .mask beside the other files says which
tokens belong to answers. Give `data/chats_messages_document` to `--data-path` with `--sft` then.

Give `data/corpus_text_document` to `--data-path` then. The .json holds checksums of the other two
files and of the tokenizer; keep the three together. PREFIX_manifest.json says what was read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megasparse.cli import guarded
from megasparse.data.manifest import ERROR, ON_BAD_LINE, PreprocessOptions
from megasparse.data.preprocess import preprocess
from megasparse.data.tokenizers.token_flags import add_token_flags, token_flags
from megasparse.data.tokenizers.tokenizer import HUGGINGFACE, SENTENCEPIECE
from megasparse.log import logger


def parse_args(argv: Sequence[str] | None) -> PreprocessOptions:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="files, folders and pipes, read in this order; '-' is standard input",
    )
    parser.add_argument(
        "--json-keys",
        nargs="+",
        help="keys (Parquet: columns) of the texts, one dataset each (default: text; with --sft "
        "the one key of the conversations, messages)",
    )
    parser.add_argument(
        "--sft",
        action="store_true",
        help="conversations for supervised fine-tuning, in the chat template of the tokenizer",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="with --sft: a Jinja template (default: chat_template.jinja or tokenizer_config.json "
        "beside the tokenizer)",
    )
    parser.add_argument("--output-prefix", required=True, help="path and begin of the names")
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        required=True,
        help="SentencePiece .model, Hugging Face tokenizer.json, or a directory with one",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=(SENTENCEPIECE, HUGGINGFACE),
        help="to insist on a type (default: told by the file)",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: on)",
    )
    add_token_flags(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--on-bad-line",
        choices=ON_BAD_LINE,
        default=ERROR,
        help="a line or row that holds no text (or no conversation that the template takes) ends "
        "the work, or is left out and counted (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    args = parser.parse_args(argv)
    return PreprocessOptions(
        input=tuple(args.input),
        output_prefix=os.path.expanduser(args.output_prefix),
        tokenizer_model=args.tokenizer_model.expanduser(),
        tokenizer_type=args.tokenizer_type,
        tokens=token_flags(args),
        json_keys=tuple(args.json_keys or ["messages" if args.sft else "text"]),
        append_eod=args.append_eod,
        workers=args.workers,
        overwrite=args.overwrite,
        on_bad_line=args.on_bad_line,
        sft=args.sft,
        chat_template=args.chat_template and args.chat_template.expanduser(),
    )


def run(options: PreprocessOptions) -> None:
    """Preprocess, and say what was written."""
    summaries = preprocess(options)
    bad = summaries[0].bad
    if bad.first:
        count = bad.of_input.total()
        logger.warning("%d bad lines left out, the first %d:", count, len(bad.first))
        for place in bad.first:
            logger.warning("  %s", place)
    for summary in summaries:
        sidecar = summary.sidecar
        told = f"{summary.prefix}: {sidecar.num_documents} documents, {sidecar.num_tokens} tokens "
        told += f"({sidecar.dtype}), {summary.num_empty} empty documents left out"
        if (chat := sidecar.conversations) is not None:
            share = chat.num_answer_tokens / sidecar.num_tokens
            told += f", {chat.num_answer_tokens} tokens of answers ({share:.1%})"
        print(told)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_args(argv)
    return guarded("preprocess_data.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
