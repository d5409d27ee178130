"""Command lines of Megatron's users train: published scripts with small sizes appended to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megasparse.data.tokenizers.tokenizer import load_tokenizer
from megasparse.preflight.settings import prepare
from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.config.published import PUBLISHED, SMALL, make_files
from tests.runs import TINY, train


def _argv(name: str, folder: Path, *more: str) -> list[str]:
    script = PUBLISHED[name]
    if script.json is not None:
        sizes = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1}
        script = dataclasses.replace(script, json=script.json | sizes)
    make_files(script, folder)
    return [*script.argv(folder), *SMALL, *more]


def test_gpt3_starts_and_the_same_command_continues(tmp_path):
    argv = _argv("gpt3_175b", tmp_path, "--train-iters", "6", "--lr-decay-iters", "6")
    notes = " ".join(prepare(argv, 1).notes)
    assert "--fp16 becomes --bf16" in notes and "nothing to do for --attention-backend" in notes
    rows = dist.run(train, 1, [*argv, "--exit-interval", "3"])[0]
    assert [row["step"] for row in rows] == [1, 2, 3]
    rows = dist.run(train, 1, argv)[0]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # The folder of --save holds everything, the tokenizer of GPT-2's two files too.
    made = load_tokenizer(tmp_path / "c" / "tokenizer.json", probe=False)
    assert made.encode("ab<|endoftext|>")[0] == 94 and 95 not in made.encode("ab<|endoftext|>")
    assert made.eod == 95 and made.decode(made.encode("ab ba")) == "ab ba".replace(" ", "")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "gpt3_175b"])
def test_others_start(name, tmp_path):
    steps = ["--train-iters", "2", "--lr-decay-iters", "2", "--lr-warmup-iters", "0"]
    if "--train-samples" in PUBLISHED[name].words:
        steps = ["--train-samples", "4", "--lr-decay-samples", "4", "--lr-warmup-samples", "0"]
    steps += ["--num-workers", "0"]
    steps += ["--vocab-size", "128"] if "NullTokenizer" in PUBLISHED[name].words else []
    argv = _argv(name, tmp_path, *steps)
    assert len(dist.run(train, 1, argv)[0]) == 2
    assert (tmp_path / "c" / "step-00000002").is_dir()


def test_ends_of_the_model_have_their_own_rate(tmp_path, dataset):
    """With tied weights on two stages: both copies step alike, and nothing else moves."""
    flags = [*TINY, "--data-path", dataset, "--sparsity-recipe", "dense", "--masked-decay", "none"]
    flags += ["--pipeline-model-parallel-size", "2", "--train-iters", "1", "--lr", "1e-12"]
    flags += ["--replica-check-interval", "1", "--weight-decay", "0"]
    weights = []
    for name, more in (("still", []), ("moved", ["--decoupled-lr", "1e-2"])):
        folder = tmp_path / name
        dist.run(train, 2, [*flags, *more, "--run-dir", str(folder)])
        reader = newest_valid(folder / "checkpoints")
        keys = [key for key in reader.keys("param/") if "weight" in key]
        weights.append({key: reader.read(key) for key in keys})
    still, moved = weights
    assert len(still) >= 8
    for key, value in still.items():
        step = float((moved[key] - value).abs().max())
        assert step > 5e-3 if "word_embeddings" in key else step < 1e-9, (key, step)
