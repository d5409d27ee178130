"""The data tools as a user runs them: from sources to a dataset, and killed on the way."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megasparse.data.indexed import validate
from megasparse.data.jsonl import read_texts
from megasparse.data.sidecar import check_sidecar
from megasparse.data.tokenizers.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 60
started: list[subprocess.Popen] = []  # by the running test


def load(name: str) -> ModuleType:
    return importlib.import_module(f"tools.{name}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `corpus.jsonl` and `tokenizer.model`, made by the tools."""
    directory = tmp_path_factory.mktemp("made")
    corpus, model = str(directory / "corpus.jsonl"), str(directory / "tokenizer.model")
    assert load("make_corpus").main(["--output", corpus, "--max-bytes", "1000000"]) == 0
    train = ["--input", corpus, "--output", model, "--vocab-size", "1024"]
    assert load("train_tokenizer").main(train) == 0
    return directory


def arguments(made: Path, prefix: Path, *more: str) -> list[str]:
    return [
        *("--input", str(made / "corpus.jsonl"), "--output-prefix", str(prefix)),
        *("--tokenizer-model", str(made / "tokenizer.model"), *more),
    ]


def prepare(file_limit: int) -> None:
    """Set up a child process before it runs Python."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """End what a failed test leaves running."""
    yield
    while started:
        process = started.pop()
        process.kill()
        process.communicate()


def start(command: list[str], file_limit: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """Start a tool as a process of its own, with SIGINT as in a terminal (CI may ignore it)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / command[0]), *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: prepare(file_limit),
    )
    started.append(process)
    return process


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def test_from_sources_to_a_dataset_that_megatron_reads(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tool = load("preprocess_data")
    assert tool.main(arguments(made, tmp_path / "new" / "d")) == 0
    prefix = tmp_path / "new" / "d_text_document"
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "d_manifest.json",
        "d_text_document.bin",
        "d_text_document.idx",
        "d_text_document.json",
    ]
    tokenizer = load_tokenizer(made / "tokenizer.model")
    texts = list(read_texts(made / "corpus.jsonl"))
    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == len(texts)
    for number in (0, len(texts) // 2, len(texts) - 1):
        ids = dataset[number].tolist()
        assert ids[-1] == tokenizer.eod and tokenizer.decode(ids[:-1]) == texts[number]
    index = validate(prefix, tokenizer.vocab_size)
    check_sidecar(prefix, tokenizer.digest, verify="full")
    assert f"{len(texts)} documents, {index.num_tokens} tokens (uint16), 0 empty" in (
        capsys.readouterr().out
    )
    # Again: refused, then replaced by the same bytes.
    before = (prefix.parent / "d_text_document.bin").read_bytes()
    assert tool.main(arguments(made, tmp_path / "new" / "d")) == 65
    error = capsys.readouterr().err
    assert error.startswith("preprocess_data.py: error: ") and error.count("\n") == 1
    again = arguments(made, tmp_path / "new" / "d", "--overwrite", "--no-append-eod")
    assert tool.main(again) == 0
    assert len(before) - (prefix.parent / "d_text_document.bin").stat().st_size == 2 * len(texts)


def test_trained_tokenizer_is_reproducible_and_exact(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tool = load("train_tokenizer")
    again = tmp_path / "again.model"
    command = ["--input", str(made / "corpus.jsonl"), "--output", str(again)]
    assert tool.main([*command, "--vocab-size", "1024"]) == 0
    assert again.read_bytes() == (made / "tokenizer.model").read_bytes()
    summary = capsys.readouterr().out
    assert "1024 tokens" in summary and load_tokenizer(again).digest in summary
    assert tool.main([*command, "--vocab-size", "1024"]) == 65
    assert "exists already" in capsys.readouterr().err
    tokenizer = load_tokenizer(again)
    for text in read_texts(made / "corpus.jsonl"):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_chunks_lose_nothing_and_stay_short() -> None:
    tool = load("train_tokenizer")
    text = "a\n" * 5000 + "\n\n" + "b" * 9001 + "\r\nlast"
    chunks = list(tool.chunks(text))
    assert "".join(chunks) == text
    assert max(map(len, chunks)) < 2 * tool.CHUNK_CHARACTERS
    assert list(tool.chunks("")) == []


@pytest.mark.parametrize(
    ("tool", "command", "code", "message"),
    [
        ("make_corpus", ["--output", "c.jsonl", "--max-bytes", "0"], 65, "max_bytes: found 0"),
        ("train_tokenizer", ["--input", "none", "--output", "t.model"], 65, "none: cannot read"),
        ("train_tokenizer", ["--input", "c", "--output", "t.bin"], 65, "t.bin: expected a name"),
        (
            "preprocess_data",
            ["--input", "none", "--output-prefix", "d", "--tokenizer-model", "t.model"],
            65,
            "none: cannot read",
        ),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    tool: str,
    command: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(tool).main(command) == code
    error = capsys.readouterr().err
    assert error.startswith(f"{tool}.py: error: {message}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def long_input(made: Path, tmp_path: Path) -> Path:
    """Some ten seconds of tokenizing: any kill falls into the middle of it."""
    path = tmp_path / "long.jsonl"
    path.write_bytes((made / "corpus.jsonl").read_bytes() * 40)
    return path


def start_long(made: Path, long_input: Path, output: Path, workers: int) -> subprocess.Popen:
    """Start pre-processing and wait until tokens are being written."""
    command = arguments(made, output / "d", "--workers", str(workers))
    command[1] = str(long_input)
    process = start(["preprocess_data.py", *command])

    def writing() -> bool:
        assert process.poll() is None, process.communicate()
        return any(path.stat().st_size for path in output.glob(".*.bin.*.tmp"))

    output.mkdir()
    wait_until(writing, "tokens are written")
    return process


def workers_of(process: subprocess.Popen) -> list[int]:
    """Ids of the worker processes (not of multiprocessing's resource tracker)."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ignores_sigint(process_id: int) -> bool:
    status = Path(f"/proc/{process_id}/status").read_text()
    ignored = next(line for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(ignored.split()[1], 16) & 1 << (signal.SIGINT - 1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [1, 2])
def test_terminated_run_leaves_nothing(
    made: Path, long_input: Path, tmp_path: Path, number: int, code: int, workers: int
) -> None:
    process = start_long(made, long_input, tmp_path / "out", workers)
    children = workers_of(process)
    assert len(children) == (workers if workers > 1 else 0)
    if number == signal.SIGINT:  # Ctrl-C goes to all processes of the terminal
        wait_until(lambda: all(map(ignores_sigint, children)), "the workers are ready")
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == code and "Traceback" not in error
    assert list((tmp_path / "out").iterdir()) == []
    wait_until(lambda: not any(map(alive, children)), "the workers end")


def test_killed_run_leaves_no_dataset_and_no_workers(
    made: Path, long_input: Path, tmp_path: Path
) -> None:
    process = start_long(made, long_input, tmp_path / "out", 2)
    children = workers_of(process)
    assert len(children) == 2
    process.kill()
    process.wait(timeout=TIMEOUT_SECONDS)
    wait_until(lambda: not any(map(alive, children)), "the workers end")
    _, error = process.communicate(timeout=TIMEOUT_SECONDS)  # ends: no worker holds the pipes
    assert "Traceback" not in error
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left and all(name.startswith(".") and name.endswith(".tmp") for name in left)
    assert load("preprocess_data").main(arguments(made, tmp_path / "out" / "d")) == 0


def test_dead_worker_is_an_error_and_not_a_hang(
    made: Path, long_input: Path, tmp_path: Path
) -> None:
    process = start_long(made, long_input, tmp_path / "out", 2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 65
    assert error.splitlines()[-1].startswith("preprocess_data.py: error: a worker process died")
    assert list((tmp_path / "out").iterdir()) == []


def test_file_that_cannot_grow_is_an_error(made: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails the write as a full disk does."""
    process = start(
        ["preprocess_data.py", *arguments(made, tmp_path / "d")],
        file_limit=100_000,
    )
    _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 65
    assert error == (
        f"preprocess_data.py: error: {tmp_path}/d_text_document.bin: cannot write: File too large\n"
    )
    assert list(tmp_path.iterdir()) == []
