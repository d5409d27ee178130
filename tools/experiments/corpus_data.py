"""What comparisons of runs share: a text made into data, and the runs' arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megasparse.config import load_config, resolve
from megasparse.data.blend import parse_split
from megasparse.data.corpus import write_corpus
from megasparse.data.sidecar import read_sidecar
from megasparse.errors import ConfigError, MegasparseError
from tools import preprocess_data, train_tokenizer
from tools.experiments import machine_texts
from tools.experiments.run_queue import ROOT

TOKENIZER_BYTES = 8_000_000  # that a small vocabulary is trained on


@dataclass(frozen=True)
class Text:
    """What the data are made of.

    Attributes:
        vocab_size: of the tokenizer.
        corpus_bytes: of each source at most.
        installed_packages: their sources too, not only the standard library's.
        workers: of the preprocessing.
        whole_machine: all that `machine_texts` finds instead, `corpus_bytes` in all; no run may
            see any of it twice.
    """

    vocab_size: int
    corpus_bytes: int
    installed_packages: bool
    workers: int
    whole_machine: bool = False


def make_data(output: Path, text: Text, corpus: Sequence[Path]) -> None:
    """`tokenizer.model` and `data_text_document` in a folder, unless they are there.

    Args:
        corpus: JSONL files; none: made from the sources of this Python.
    """
    tokenizer, prefix = output / "tokenizer.model", output / "data"
    if (output / "data_text_document.idx").exists() and tokenizer.exists():
        return
    files = list(corpus)
    if not files and text.whole_machine:
        size = ["--max-bytes", str(text.corpus_bytes), "--workers", str(2 * text.workers)]
        _run(machine_texts, ["--output", str(output), *size], text.workers)
        files = sorted(output.glob("machine-*.jsonl"))
    elif not files:
        files = [output / "corpus.jsonl"]
        write_corpus(files[0], text.corpus_bytes)
        if text.installed_packages:
            files.append(output / "packages.jsonl")
            write_corpus(files[1], text.corpus_bytes, Path(sysconfig.get_paths()["purelib"]))
    names = ["--input", *map(str, files), "--overwrite"]
    vocabulary = ["--output", str(tokenizer), "--vocab-size", str(text.vocab_size)]
    if text.whole_machine:
        vocabulary += ["--max-bytes", str(TOKENIZER_BYTES)]
    workers = ["--tokenizer-model", str(tokenizer), "--workers", str(text.workers)]
    for tool, arguments in (
        (train_tokenizer, vocabulary),
        (preprocess_data, ["--output-prefix", str(prefix), *workers]),
    ):
        _run(tool, [*names, *arguments], text.workers)
    for path in output.glob("machine-*.jsonl"):
        path.unlink()


def _run(tool: ModuleType, arguments: list[str], workers: int) -> None:
    """A command. One that starts workers has a process of its own: each worker imports anew what
    its parent has imported, which is little there."""
    if workers == 1:
        code = tool.main(arguments)
    else:
        command = [sys.executable, "-m", tool.__name__, *arguments]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths}
        code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise MegasparseError(f"{tool.__name__} ended with exit code {code}")


def check_fresh(output: Path, arguments: Sequence[str]) -> None:
    """Refuse a run that would see text twice.

    Args:
        output: folder of `make_data`.
        arguments: of the run.

    Raises:
        ConfigError: naming the tokens that it takes and those that are there.
    """
    sidecar = read_sidecar(output / "data_text_document")
    config = resolve(load_config(arguments), 1)
    train = config.train
    wanted = train.train_iters * train.global_batch_size * config.model.seq_length
    if sidecar is not None:
        found = int(sidecar.num_tokens * parse_split(config.data.split)[0])
        if wanted > found:
            raise ConfigError(
                f"{wanted:,} tokens a run, but {output} has {found:,} for training: fewer "
                f"--train-iters, or more text (--corpus)"
            )


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
