"""Runs of BERT: every recipe trains and ends as it promises; a resumed run repeats every bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import dist
from tests.runs import TINY, train

BERT = [*TINY, "--vocab-size", "132", "--model-type", "bert", "--geglu", "--seq-length", "32"]
BERT += ["--mask-update-interval", "2", "--eval-iters", "1", "--eval-interval", "3"]
WIDE = ["--hidden-size", "128", "--ffn-hidden-size", "128", "--num-attention-heads", "2"]
S_STE = ["--sparsity-recipe", "s_ste", "--masked-decay", "none", "--mask-update-interval", "none"]
# The report at a run's end reads the checkpoint back and fails where a weight is not 2:4.
RUNS = {
    "sr_ste": ["--sparsity-recipe", "sr_ste", "--masked-decay", "1e-3"],
    "s_ste": S_STE,
    "ast": ["--sparsity-recipe", "ast", "--masked-decay", "1e-3", "--no-bert-binary-head"],
    "fst, all linears, fp8": [
        *WIDE, "--bf16", "--fp8-format", "e4m3", "--sparse-layers", "*.mlp.*", "*.self_attention.*",
    ],
}  # fmt: skip


def _runs(rank: int, world: int, folder: str, data: str) -> dict[str, list[dict[str, Any]]]:
    base = [*BERT, "--data-path", data]

    def run(name: str, *flags: str) -> list[dict[str, Any]]:
        return train(rank, world, [*base, "--run-dir", f"{folder}/{name}", *flags])

    whole = ["--train-iters", "5", "--zero-stage", "1"]
    found = {"straight": run("straight", *whole)}
    run("resumed", *whole, "--exit-interval", "3")
    found["resumed"] = run("resumed", *whole, "--resume")
    for name, flags in RUNS.items():
        found[name] = run(name.split(",")[0], "--train-iters", "3", *flags)
    given = ["--load", f"{folder}/straight", "--finetune", "--override-tokenizer"]
    given += ["--data-path", "--num-classes", "2", "--train-data", f"{folder}/texts.jsonl"]
    given += ["--valid-data", f"{folder}/texts.jsonl", "--tokenizer-model", f"{folder}/words.json"]
    given += ["--train-iters", "30", "--eval-iters", "5", "--lr", "3e-3"]
    given += ["--micro-batch-size", "8", "--global-batch-size", "8", "--eval-interval", "30"]
    found["classes"] = run("classes", *given)
    return found


def _texts(folder: Path) -> None:
    """Words w0 to w99 and a tokenizer of them; the class is whether they are below w50."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {name: number for number, name in enumerate(("[UNK]", "[EOS]", "[PAD]"))}
    words = {f"w{number}": number + len(names) for number in range(100)}
    made = Tokenizer(models.WordLevel({**names, **words}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "words.json"))
    rows = [
        {
            "text": " ".join(f"w{50 * label + (7 * row + 3 * n) % 50}" for n in range(9)),
            "label": f"{label}",
        }
        for row in range(20)
        for label in range(2)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("bert")
    _texts(folder)
    return folder, dist.run(_runs, 1, str(folder), dataset)[0]


def _tensors(run: Path, step: int) -> dict[str, str]:
    from megasparse.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(run / "checkpoints" / f"step-{step:08d}")
    return {key: reader.read(key).float().sum().item().hex() for key in reader.keys("")}


def test_a_resumed_run_repeats_every_bit(runs):
    folder, rows = runs
    names = ("step", "loss", "lm_loss", "sop_loss", "grad_norm", "samples", "valid_lm_loss")
    for straight, resumed in zip(rows["straight"], rows["resumed"], strict=True):
        assert {n: straight.get(n) for n in names} == {n: resumed.get(n) for n in names}
    last = rows["straight"][-1]
    assert last["valid_loss"] == pytest.approx(last["valid_lm_loss"] + last["valid_sop_loss"])
    stored = _tensors(folder / "straight", 5)
    assert stored == _tensors(folder / "resumed", 5)
    assert any(key.startswith("sparsity/encoder.layers.0.mlp") for key in stored)


def test_a_head_for_classes_is_fine_tuned(runs):
    folder, rows = runs
    rows = rows["classes"]
    assert rows[-1]["valid_accuracy"] > 0.8 and rows[-1]["valid_loss"] < rows[0]["loss"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    before, after = _tensors(folder / "straight", 5), _tensors(folder / "classes", 30)
    masks = [key for key in before if key.endswith("/mask")]
    assert len(masks) == 4
    assert {key: before[key] for key in masks} == {key: after[key] for key in masks}
    assert "param/classification_head.weight" in after and "param/lm_head.dense.weight" in before
    assert (
        before["param/encoder.final_layernorm.weight"]
        != after["param/encoder.final_layernorm.weight"]
    )


@pytest.mark.parametrize("recipe", RUNS)
def test_every_recipe_trains(runs, recipe):
    rows = runs[1][recipe]
    assert len(rows) == 3 and all(row["sparse"] for row in rows)
    assert all(json.dumps(row["loss"]) != "null" for row in rows)
    pairs = "--no-bert-binary-head" not in RUNS[recipe]
    assert all(("sop_loss" in row) == pairs and row["lm_loss"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline-model-parallel-size", "2"], "pipeline_model_parallel_size 2 with model_type"),
        (["--zero-stage", "2"], "zero_stage 2 with model_type bert is not supported"),
        (["--position-embedding-type", "rope"], "position_embedding_type rope with model_type"),
        (["--window-size", "7,0"], "window_size 7,0 with model_type bert"),
        (["--reset-attention-mask"], "reset_attention_mask True with model_type bert"),
        (["--kd-loss-weight", "1"], "kd_loss_weight 1.0 with model_type bert"),
        (["--load-hf", "H"], "load_hf .*H with model_type bert"),
        (["--num-classes", "3"], "num_classes 3 needs train_data"),
        (["--train-data", "T"], "train_data and valid_data are of classes, set num_classes"),
        (["--seq-length", "4"], "seq_length 4 with model_type bert, expected at least 8"),
        (["--model-type", "gpt", "--num-classes", "3"], "num_classes 3 needs model_type bert"),
        (["--model-type", "gpt", "--train-data", "T"], "there is no num_classes"),
    ],
)
def test_what_bert_cannot_do_is_named(flags, message):
    from megasparse.config import load_config, resolve
    from megasparse.errors import ConfigError

    world = 2 if flags[0].startswith("--pipeline") else 1
    with pytest.raises(ConfigError, match=message):
        resolve(load_config([*BERT, "--data-path", "D", *flags]), world)


def test_what_is_of_decoders_alone_is_refused(runs, tmp_path):
    from megasparse.checkpoint.model import StoredModel
    from megasparse.checkpoint.reader import CheckpointReader
    from megasparse.convert.huggingface.architecture import huggingface_config
    from megasparse.convert.megatron.torch_dist_write import write_torch_dist
    from megasparse.errors import ConfigError
    from megasparse.inference.offline import StoredRun

    folder, _ = runs
    saved = folder / "straight" / "checkpoints"
    stored = StoredModel(CheckpointReader(saved / "step-00000005"), vocab_size=132)
    assert len(stored.sparse) == 4 and all(name.startswith("encoder.") for name in stored.sparse)
    with pytest.raises(ConfigError, match="no Hugging Face architecture .* model_type is 'bert'"):
        huggingface_config(stored.model, "float32")
    with pytest.raises(ConfigError, match="model_type is bert, Megatron's checkpoints"):
        write_torch_dist(stored, tmp_path / "out", 16)
    with pytest.raises(ConfigError, match="model_type is bert, pruning and quantizing"):
        StoredRun(saved)
