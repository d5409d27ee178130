"""What comparisons of runs share: a text made into data, and the runs' arguments."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megasparse.data.corpus import write_corpus
from megasparse.data.sidecar import read_sidecar
from megasparse.errors import MegasparseError
from tools import preprocess_data, train_tokenizer
from tools.experiments.run_queue import ROOT


@dataclass(frozen=True)
class Text:
    """What the data are made of.

    Attributes:
        vocab_size: of the tokenizer.
        corpus_bytes: of each source at most.
        installed_packages: their sources too, not only the standard library's.
        workers: of the preprocessing.
    """

    vocab_size: int
    corpus_bytes: int
    installed_packages: bool
    workers: int


def make_data(output: Path, text: Text, corpus: Sequence[Path]) -> None:
    """`tokenizer.model` and `data_text_document` in a folder, unless they are there.

    Args:
        corpus: JSONL files; none: made from the sources of this Python.
    """
    tokenizer, prefix = output / "tokenizer.model", output / "data"
    if (output / "data_text_document.idx").exists() and tokenizer.exists():
        return
    files = list(corpus)
    if not files:
        files = [output / "corpus.jsonl"]
        write_corpus(files[0], text.corpus_bytes)
        if text.installed_packages:
            files.append(output / "packages.jsonl")
            write_corpus(files[1], text.corpus_bytes, Path(sysconfig.get_paths()["purelib"]))
    names = ["--input", *map(str, files), "--overwrite"]
    vocabulary = ["--output", str(tokenizer), "--vocab-size", str(text.vocab_size)]
    workers = ["--tokenizer-model", str(tokenizer), "--workers", str(text.workers)]
    for tool, arguments in (
        (train_tokenizer, vocabulary),
        (preprocess_data, ["--output-prefix", str(prefix), *workers]),
    ):
        code = tool.main([*names, *arguments])
        if code:
            raise MegasparseError(f"{tool.__name__} ended with exit code {code}")


def data_digest(output: Path) -> str | None:
    """SHA-256 of the tokens in a folder of `make_data`; None: there are none."""
    sidecar = read_sidecar(output / "data_text_document")
    return None if sidecar is None else sidecar.bin_sha256


def config_path(name: str) -> Path:
    """A file of configs/experiments/."""
    return ROOT / "configs" / "experiments" / name


def run_arguments(config: str, output: Path, run_dir: Path, flags: Sequence[str]) -> list[str]:
    """launch/pretrain.py's, for a run on the folder's data that goes on where it was interrupted.

    Args:
        config: name of a file in configs/experiments/.
    """
    data = ["--data-path", str(output / "data_text_document")]
    data += ["--tokenizer-model", str(output / "tokenizer.model")]
    own = ["--config", str(config_path(config)), *data, "--run-dir", str(run_dir)]
    return [*own, *flags, "--resume"]
