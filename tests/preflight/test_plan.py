"""Questions to a command line: settings that load again, a plan that writes nothing."""

from __future__ import annotations

import re

import pytest

from megasparse.config import load_config, resolve
from megasparse.errors import ConfigError, DataError
from megasparse.preflight.plan import answer
from tests.config.published import PUBLISHED, SMALL, make_files
from tests.runs import TINY


def test_no_question_no_answer():
    assert answer(["--mock-data", "--no-bf16"]) is None
    assert re.match(r"megasparse \d+\.\d+\.\d+, torch ", answer(["--lr", "--version"]) or "")


def test_printed_settings_are_the_runs(tmp_path):
    flags = [*TINY, "--mock-data", "--tensor-model-parallel-size", "2", "--run-dir"]
    flags.append(str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(answer([*flags, "--print-config"]) or "")
    again = load_config(["--config", str(tmp_path / "run.yaml")])
    assert resolve(again, 2) == resolve(load_config(flags), 2)
    assert not (tmp_path / "run").exists()


def test_settings_are_printed_before_their_files_are_made(tmp_path):
    names = {"--data-path": "no/data", "--tokenizer-model": "no/t.model", "--load": "no/run"}
    flags = [*TINY, *(word for pair in names.items() for word in pair)]
    told = answer([*flags, "--run-dir", str(tmp_path / "run"), "--print-config"]) or ""
    assert "no/data" in told and "no/t.model" in told and "no/run" in told
    with pytest.raises(DataError):
        answer([*flags[:-2], "--dry-run"])


def test_a_dry_run_tells_the_run_and_writes_nothing(tmp_path):
    make_files(PUBLISHED["gpt3_175b"], tmp_path)
    argv = [*PUBLISHED["gpt3_175b"].argv(tmp_path), *SMALL, "--sparsity-recipe", "fst"]
    argv += ["--tensor-model-parallel-size", "2", "--gpus", "4", "--dry-run"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    told = answer(argv) or ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for words in (
        "4 ranks: tensor 2 x pipeline 1 x data 2, ZeRO 1",
        "micro-batches of 1 on a rank",
        "500,000 steps, 6",
        "mlp.linear_fc1",
        "at the peak",
        "(all)",
        "--fp16 becomes --bf16",
        "without --dry-run it starts",
    ):
        assert words in told, (words, told)
    long = [line for line in told.splitlines() if len(line) > 80 and str(tmp_path) not in line]
    assert not long
    with pytest.raises(ConfigError, match="global_batch_size"):
        answer([*argv, "--global-batch-size", "3"])
    with pytest.raises(ConfigError, match="--gpus: found 'x'"):
        answer(["--dry-run", "--gpus", "x"])
