"""Tokenizers: SentencePiece `.model`, Hugging Face `tokenizer.json`, and none for mock data.

Only the modules of tokenizers import sentencepiece and tokenizers. Three rules hold for all:

- a model file is first loaded in a child process, because a crafted or damaged SentencePiece
  model can corrupt memory (CVE-2026-1260 and before): the child may crash, the run may not;
- text is only text: `<eod>` or `<|endoftext|>` written in a document never becomes the control
  token, unless `parse_special` says so, and nothing is cut or padded;
- `digest` is the SHA-256 of the model file, kept with each dataset made with it.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from megasparse.data.file_errors import read_error
from megasparse.data.tokenizers.hf_tokenizer import HuggingFaceTokenizer
from megasparse.data.tokenizers.special_tokens import (
    BY_THE_FILES,
    EOD_PIECE,
    TOKENIZER_CONFIG,
    TokenOptions,
    read_declared,
    read_json_object,
)
from megasparse.data.tokenizers.spm_tokenizer import SentencePieceTokenizer
from megasparse.errors import DataError
from megasparse.input_files import read_regular

SENTENCEPIECE = SentencePieceTokenizer.tokenizer_type
HUGGINGFACE = HuggingFaceTokenizer.tokenizer_type
NULL = "NullTokenizer"
# Of a folder. An export that had to change its tokenizer.json names the original.
TOKENIZER_JSON, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"
ORIGINAL_JSON = "tokenizer_original.json"
# A name that no engine takes for a tokenizer that it would read in its own way.
ORIGINAL_MODEL = "sentencepiece.model"
MADE_FROM = "made_from"  # in tokenizer_config.json
TOKENIZER_TYPES = (SENTENCEPIECE, HUGGINGFACE, NULL)

PROBE_TIMEOUT_SECONDS = 60
# Runs isolated (-I), with the parent's import path: a file in the current directory that is
# called like one of the libraries is not imported.
_PROBE = """
import os, resource, sys
sys.path[:] = sys.argv[2].split(os.pathsep)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
data = sys.stdin.buffer.read()
sample = "def f(x):\\n\\treturn x  # \\u00e9\\u4e2d\\U0001f389\\n"
if sys.argv[1] == "SentencePieceTokenizer":
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    for index in range(model.vocab_size()):
        model.id_to_piece(index)
    model.decode(model.encode(sample))
else:
    import tokenizers
    model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    model.decode(model.encode(sample, add_special_tokens=False).ids)
"""


class Tokenizer(Protocol):
    """What the data tools and the launcher need of a tokenizer.

    `tokenizer_type` is Megatron's name of the kind, `vocab_size` is one more than the largest id,
    `eod` is the id that ends a document, `bos` the one that begins it (None: there is none), `pad`
    one that fills batches; `eod_piece`, `bos_piece` and `pad_piece` are their names. With `add_bos`
    documents and prompts begin with `bos`; with `parse_special` control tokens that are written in
    a text become those tokens. `digest` is the SHA-256 (hex) of the model file, `control` the ids
    of control tokens by their names.
    """

    tokenizer_type: str
    vocab_size: int
    eod: int
    eod_piece: str
    bos: int | None
    bos_piece: str | None
    pad: int | None
    pad_piece: str | None
    add_bos: bool
    parse_special: bool
    digest: str
    control: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any token for its begin or end."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        ...

    def pieces(self) -> list[str]:
        """Name of every token, by id; "" where there is none."""
        ...


class NullTokenizer:
    """No text, for mock data: `encode("5 7")` is `[5, 7]`.

    `vocab_size` counts the end-of-document token, which is the last id (Megatron's tokenizer of
    this name adds one to the size that it is given).
    """

    tokenizer_type = NULL

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 2:
            raise DataError(f"{NULL}: found vocab_size {vocab_size}, expected at least 2")
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1
        self.eod_piece = str(self.eod)
        self.bos: int | None = None
        self.bos_piece: str | None = None
        self.pad: int | None = None
        self.pad_piece: str | None = None
        self.add_bos = self.parse_special = False
        self.control: dict[str, int] = {}
        self.digest = hashlib.sha256(f"{NULL}:{vocab_size}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(index) for index in ids)

    def pieces(self) -> list[str]:
        return [str(index) for index in range(self.vocab_size)]


def load_tokenizer(
    path: str | os.PathLike | None,
    tokenizer_type: str | None = None,
    *,
    vocab_size: int | None = None,
    probe: bool = True,
    options: TokenOptions = BY_THE_FILES,
) -> Tokenizer:
    """Load a tokenizer, deciding its kind by the file's name or content.

    Args:
        path: a SentencePiece `.model`, a `tokenizer.json`, or a directory with `tokenizer.json`
            or `tokenizer.model`; None for `NullTokenizer`.
        tokenizer_type: one of `TOKENIZER_TYPES`, to insist on it.
        vocab_size: the size of a `NullTokenizer`.
        probe: load the file in a child process first. Only a process whose parent has just done
            so may say False.
        options: which tokens begin and end a document; by default what the files beside the model
            say.

    Raises:
        DataError: the file is missing, empty, damaged, not of that type, or has no token that
            ends a document, or not one that was asked for.
    """
    if tokenizer_type is not None and tokenizer_type not in TOKENIZER_TYPES:
        expected = ", ".join(TOKENIZER_TYPES)
        raise DataError(f"tokenizer_type: found {tokenizer_type!r}, expected one of {expected}")
    if tokenizer_type == NULL or path is None:
        if tokenizer_type not in (None, NULL) or vocab_size is None:
            raise DataError("tokenizer_model: found none, expected a tokenizer file")
        return NullTokenizer(vocab_size)
    file = _model_file(Path(path))
    try:
        model = read_regular(file)
    except OSError as error:
        raise read_error(file, error) from error
    if not model:
        raise DataError(f"{file}: found an empty file, expected a tokenizer model")
    kind = _infer_type(file, model) if tokenizer_type is None else tokenizer_type
    if probe:
        _probe(kind, model, file)
    build = SentencePieceTokenizer if kind == SENTENCEPIECE else HuggingFaceTokenizer
    try:
        return build(model, str(file), read_declared(file.parent), options)
    except DataError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions
        raise _damaged(file, kind, str(error)) from error


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    num_threads: int = 2,
) -> bytes:
    """Train a SentencePiece model that gives back every text exactly (but U+2581, a space).

    No normalisation, no dummy prefix, whitespace kept and allowed as pieces of its own (runs of
    indentation), bytes as fallback, and `<eod>` as a control symbol, which no text can produce.
    The result depends on the texts and the arguments only.

    Args:
        texts: pieces of documents; ones above 64 KiB are ignored by the trainer.
        vocab_size: an upper bound; a small corpus gives fewer pieces.
        model_type: "bpe" or "unigram".
        num_threads: of the unigram trainer; part of what its result depends on.

    Raises:
        DataError: the sizes are not possible, or there is no text.
    """
    if model_type not in ("bpe", "unigram"):
        raise DataError(f"model_type: found {model_type!r}, expected 'bpe' or 'unigram'")
    if not 300 <= vocab_size < 2**31:  # 256 bytes, 4 special tokens, some characters
        raise DataError(f"vocab_size: found {vocab_size}, expected at least 300")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            control_symbols=[EOD_PIECE],
            max_sentence_length=1 << 16,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot train a tokenizer of {vocab_size} tokens: {reason}") from error
    return model.getvalue()


def tokenizer_file_of(folder: Path) -> Path | None:
    """The tokenizer of a folder: what its tokenizer.json was made from, or that; None: none.

    Datasets are made with the original, and compare digests with it.

    Raises:
        DataError: tokenizer_config.json is damaged.
    """
    names = [TOKENIZER_JSON, TOKENIZER_MODEL]
    made_from = read_json_object(folder / TOKENIZER_CONFIG).get(MADE_FROM)
    if made_from in (TOKENIZER_MODEL, ORIGINAL_JSON, ORIGINAL_MODEL):
        names.insert(0, made_from)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _model_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    file = tokenizer_file_of(path)
    if file is None:
        raise DataError(f"{path}: found no {TOKENIZER_JSON} or {TOKENIZER_MODEL} in this directory")
    return file


def _infer_type(file: Path, model: bytes) -> str:
    if file.suffix == ".json":
        return HUGGINGFACE
    if file.suffix == ".model":
        return SENTENCEPIECE
    return HUGGINGFACE if model.lstrip()[:1] == b"{" else SENTENCEPIECE


def _probe(kind: str, model: bytes, file: Path) -> None:
    """Load and use `model` in a child process, so that a crash there is an error here."""
    command = [sys.executable, "-I", "-c", _PROBE, kind, os.pathsep.join(sys.path)]
    try:
        child = subprocess.run(
            command,
            input=model,
            capture_output=True,
            timeout=PROBE_TIMEOUT_SECONDS,
            check=False,
            start_new_session=True,  # signals for the run's group are no fault of the file
        )
    except subprocess.TimeoutExpired:
        raise _damaged(file, kind, f"no answer in {PROBE_TIMEOUT_SECONDS} s") from None
    if -child.returncode in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        # Somebody ended it by hand: that says nothing of the file.
        return _probe(kind, model, file)
    if child.returncode < 0:
        raise _damaged(file, kind, f"loading it ends with signal {-child.returncode}")
    if child.returncode:
        lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
        raise _damaged(file, kind, lines[-1] if lines else f"exit code {child.returncode}")


def _damaged(file: Path, kind: str, reason: str) -> DataError:
    reason = " ".join(reason.split())[:200]
    return DataError(f"{file}: found a file that is no valid {kind} model, expected one ({reason})")


def begin(tokenizer: Tokenizer) -> list[int]:
    """The ids before a document's or a prompt's own: one that begins it, or none."""
    return [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []


def token_rules(tokenizer: Tokenizer) -> dict[str, int | bool | None]:
    """What of a tokenizer flags can change, as it is kept with datasets and runs."""
    return {
        "eod": tokenizer.eod,
        "bos": tokenizer.bos,
        "add_bos": tokenizer.add_bos,
        "parse_special": tokenizer.parse_special,
    }
