"""Bad input: one clear line on every rank, a non-zero exit code, nothing half-written."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from megasparse.errors import ConfigError, DataError
from tests import dist
from tests.runs import TINY


def _main(rank, world, argv):
    """What `launch/pretrain.py` does on this rank: its exit code and what it wrote to stderr."""
    import sys

    from megasparse import log
    from megasparse.distributed.signals import StopRequest
    from megasparse.errors import MegasparseError
    from megasparse.preflight.settings import prepare
    from megasparse.train.main import main

    stream, sys.stderr = sys.stderr, io.StringIO()
    try:
        log.setup(rank)
        try:
            return main(prepare(argv, world), StopRequest()), sys.stderr.getvalue()
        except MegasparseError as error:
            log.logger.error("%s: %s", type(error).__name__, error)
            return error.exit_code, sys.stderr.getvalue()
    finally:
        sys.stderr = stream


def _remove(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()


def _truncate(prefix: Path, suffix: str, keep: int) -> None:
    path = Path(f"{prefix}{suffix}")
    path.write_bytes(path.read_bytes()[:keep])


def _other_tokenizer(prefix: Path) -> list[str]:
    """A sidecar that names another tokenizer than the one that the run is given."""
    folder = Path(prefix).parent
    from megasparse.data.tokenizers.tokenizer import train_sentencepiece

    model = folder / "tokenizer.model"
    text = ["hello world, this is text " * 20] * 20
    model.write_bytes(train_sentencepiece(text, 300))
    from megasparse.data.indexed_writer import IndexedDatasetWriter, Provenance
    from megasparse.data.tokenizers.tokenizer import NullTokenizer

    other = folder / "other"
    with IndexedDatasetWriter(other, "uint16") as writer:
        writer.add_document(list(range(2000 % 128)) * 20)
        writer.finish(Provenance(NullTokenizer(128), append_eod=True, source="test"))
    return ["--data-path", str(other), "--tokenizer-model", str(model), "--vocab-size", "512"]


CONFIG, DATA = ConfigError.exit_code, DataError.exit_code

CASES = {
    # name: (damage to a copy of the dataset, extra flags, exit code, part of the message)
    "unknown flag": (None, ["--num-layer", "3"], CONFIG, "did you mean --num-layers?"),
    "world size": (None, ["--tensor-model-parallel-size", "3"], CONFIG, "world size 2"),
    "heads": (None, ["--num-attention-heads", "3"], CONFIG, "num_attention_heads 3"),
    "4x4 block": (
        None, ["--tensor-model-parallel-size", "2", "--ffn-hidden-size", "60"], CONFIG,
        "ffn_hidden_size 60 over tensor_model_parallel_size 2",
    ),
    "pattern": (None, ["--sparse-layers", "*.mlp.linear_fc9"], CONFIG, "no linear is named like"),
    "missing bin": (lambda p: _remove(p, ".bin"), [], DATA, ".bin"),
    "missing idx": (lambda p: _remove(p, ".idx"), [], DATA, ".idx"),
    "empty bin": (lambda p: _truncate(p, ".bin", 0), [], DATA, ".bin"),
    "empty idx": (lambda p: _truncate(p, ".idx", 0), [], DATA, ".idx"),
    "truncated bin": (lambda p: _truncate(p, ".bin", 1000), [], DATA, "found 1000 bytes"),
    "truncated idx": (lambda p: _truncate(p, ".idx", 100), [], DATA, ".idx"),
    "vocabulary": (None, ["--vocab-size", "50"], DATA, "expected 0 to 49"),
    "too small": (None, ["--global-batch-size", "4096"], DATA, "at least one global batch of 4096"),
    "no validation": (None, ["--eval-iters", "2", "--split", "100,0,0"], DATA, "validation data"),
    "no data": (None, ["--data-path", "/nonexistent/x"], DATA, "/nonexistent/x"),
    "no tokenizer": (None, ["--tokenizer-model", "/nonexistent.model"], DATA, "/nonexistent.model"),
    "two sources": (None, ["--mock-data"], CONFIG, "exactly one of"),
    "bad split": (None, ["--split", "a,b"], CONFIG, "--split"),
    "recipe option": (
        None, ["--sparsity-recipe", "s_ste"], CONFIG, "the recipe s_ste has no decay",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_rank_says_the_same_line(tmp_path, dataset, name):
    damage, flags, code, message = CASES[name]
    prefix = tmp_path / "data"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{dataset}{suffix}", f"{prefix}{suffix}")
    if damage is not None:
        damage(prefix)
    run_dir = tmp_path / "run"
    argv = [*TINY, "--data-path", str(prefix), "--run-dir", str(run_dir), *flags]
    for rank, (found, text) in enumerate(dist.run(_main, 2, argv)):
        errors = [line for line in text.splitlines() if f"[rank {rank}] error" in line]
        assert found == code, text
        assert len(errors) == 1 and message in errors[0], text
        assert "Traceback" not in text
    assert not (run_dir / "metrics.jsonl").exists()
    assert not list(run_dir.glob("checkpoints/step-*"))


def test_a_tokenizer_that_did_not_make_the_data_is_named_with_both_digests(tmp_path):
    flags = _other_tokenizer(tmp_path / "data")
    sidecar = json.loads((tmp_path / "other.json").read_text())
    argv = [*TINY, *flags, "--run-dir", str(tmp_path / "run")]
    for found, text in dist.run(_main, 2, argv):
        assert found == DATA and sidecar["tokenizer_digest"] in text
