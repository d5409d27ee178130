"""The flags of commands that say which tokens begin and end a document."""

from __future__ import annotations

import argparse

from megasparse.data.tokenizers.special_tokens import TokenOptions


def add_token_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags; unset ones leave it to the tokenizer's own files, or to the run's."""
    default = "default: as the tokenizer's own files say, or the run"
    parser.add_argument("--eod-token", metavar="TOKEN", help=f"ends a document; {default}")
    parser.add_argument("--bos-token", metavar="TOKEN", help=f"begins a document; {default}")
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help=f"begin documents and prompts with that token; {default}",
    )
    parser.add_argument(
        "--parse-special",
        action=argparse.BooleanOptionalAction,
        help="control tokens that are written in a text become those tokens (default: text is "
        "text, or as the run did)",
    )


def token_flags(args: argparse.Namespace, run: TokenOptions | None = None) -> TokenOptions:
    """What the flags say, and where they are unset, the run's settings."""
    run = run or TokenOptions()
    given = {name: getattr(args, name) for name in vars(run)}
    return TokenOptions(
        **{name: vars(run)[name] if value is None else value for name, value in given.items()}
    )
