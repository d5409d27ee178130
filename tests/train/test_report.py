"""The end of a run: what its table tells, and commands that can be typed next."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megasparse.config import load_config, resolve
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.train.report import format_report, next_commands
from tests.runs import TINY

ROOT = Path(__file__).parents[2]


def test_the_table_has_the_highest_flip_rate():
    recipe = recipe_of(load_config(["--sparsity-recipe", "fst"]))
    rates = (0.003, 0.017, None, 0.001)
    rows = [{"step": n, "loss": 1.0, "flip_rate": rate} for n, rate in enumerate(rates, 1)]
    text = format_report(4, rows, [], recipe, {}, [])
    assert "0.0030 -> 0.0010" in text and "0.0170 at step 2" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("recipe", ["fst", "dense"])
@pytest.mark.parametrize("tokenizer", [[], ["--tokenizer-model", "t.model"]])
def test_the_next_commands_are_scripts_with_flags_that_they_know(recipe, tokenizer):
    flags = [*TINY, "--mock-data", "--run-dir", "runs/my run", "--masked-decay", "none"]
    config = resolve(load_config([*flags, "--sparsity-recipe", recipe, *tokenizer]), 1)
    commands = [shlex.split(line) for line in next_commands(config, recipe_of(config))]
    assert commands[0][:2] == ["tensorboard", "--logdir"] and len(commands) == 3
    for _, script, *words in commands[1:]:
        defined = (script, "megasparse/inference/loading.py", "megasparse/convert/flags.py")
        text = "".join((ROOT / name).read_text() for name in defined)
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), script
        assert any("my run" in word for word in words)
    assert ("generate" in commands[1][1]) == bool(tokenizer)
    assert ("export_sparse" in commands[2][1]) == (recipe == "fst")
