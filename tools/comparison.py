"""What comparisons of runs share: a text made into data, and trainings that are not repeated."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import preprocess_data
import train_tokenizer

from megasparse.config import load_config
from megasparse.data.corpus import write_corpus
from megasparse.errors import MegasparseError
from megasparse.train.catalog import list_steps

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch" / "pretrain.py"


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
            raise MegasparseError(f"{tool.__name__}.py ended with exit code {code}")


def train(
    config: str,
    output: Path,
    run_dir: Path,
    flags: Sequence[str],
    launch: Callable[[list[str]], None],
) -> None:
    """A run to its end on the folder's data; one that is complete is left as it is.

    Args:
        config: name of a file in configs/.
    """  # fmt: skip
    arguments = [
        "--config", str(ROOT / "configs" / config),
        "--data-path", str(output / "data_text_document"),
        "--tokenizer-model", str(output / "tokenizer.model"),
        "--run-dir", str(run_dir), *flags, "--resume",
    ]  # fmt: skip
    steps = list_steps(run_dir / "checkpoints")
    if not steps or steps[0] < load_config(arguments).train.train_iters:
        launch(arguments)


def subprocess_launch(arguments: list[str], launcher: str = "") -> None:
    """launch/pretrain.py in a process of its own.

    Args:
        launcher: command that starts its ranks (`deepspeed --num_gpus 8`); default: one rank.

    Raises:
        MegasparseError: it failed.
    """
    # Evaluations in this process have made it a rank of its own, which the run is not.
    own = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment = {"OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": str(ROOT)}
    command = shlex.split(launcher) or [sys.executable]
    code = subprocess.run([*command, str(LAUNCH), *arguments], env=environment).returncode
    if code:
        raise MegasparseError(f"pretrain.py ended with exit code {code}")
