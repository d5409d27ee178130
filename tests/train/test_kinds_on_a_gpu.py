"""Kinds of runs whose losses or batches are their own, on a GPU: they train, and save 2:4."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megasparse.data.manifest import PreprocessOptions
from megasparse.data.preprocess import preprocess
from tests.chats import make_tokenizer, questions, write_conversations
from tests.runs import LLAMA, TINY, launch, make_dataset
from tests.transformer_engine import needs_transformer_engine

WIDE = [
    "--hidden-size", "256", "--ffn-hidden-size", "512", "--num-attention-heads", "4", "--bf16",
    "--seq-length", "128", "--micro-batch-size", "8", "--global-batch-size", "8", "--train-iters",
    "6", "--log-interval", "1", "--mask-update-interval", "2", "--sparse-layers", "*.mlp.*",
    "*.self_attention.*",
]  # fmt: skip
FP8 = ["--fp8-format", "e4m3"]


def _bert(folder: Path) -> list[str]:
    data = make_dataset(folder / "data")
    return [
        *WIDE,
        *FP8,
        "--vocab-size",
        "132",
        "--model-type",
        "bert",
        "--geglu",
        "--data-path",
        data,
    ]


def _conversations(folder: Path) -> list[str]:
    """Answers to questions, from a dense model of texts."""
    make_tokenizer(folder / "tokenizer")
    texts, chats = folder / "texts.jsonl", write_conversations(folder / "chats.jsonl")
    texts.write_text("".join(json.dumps({"text": f"{q} {a}" * 40}) + "\n" for q, a in questions()))
    for source, prefix, more in (
        (texts, "data", {}),
        (chats, "chats", {"json_keys": ("messages",), "sft": True}),
    ):
        options = PreprocessOptions((source,), str(folder / prefix), folder / "tokenizer", **more)
        preprocess(options)
    model = [*LLAMA, *WIDE, "--tokenizer-model", str(folder / "tokenizer"), "--vocab-size", "300"]
    given = _dense(folder, [*model, "--data-path", str(folder / "data_text_document")])
    data = ["--train-data-path", str(folder / "chats_messages_document")]
    return [*model, *FP8, *data, *given, "--sft"]


def _retrained(folder: Path) -> list[str]:
    """CAST, in BF16 alone, from a dense model, which is its teacher too."""
    data = [*LLAMA, *WIDE, "--data-path", make_dataset(folder / "data")]
    cast = ["--sparsity-recipe", "cast", "--masked-decay", "1e-5", "--weight-scale-groups", "2"]
    loss = ["--kd-loss-weight", "0.33", "--lm-loss-weight", "0.67", "--lr", "1e-4"]
    return [*data, *_dense(folder, data), *cast, *loss]


def _dense(folder: Path, data: list[str]) -> list[str]:
    """Flags that start from a dense model, trained here."""
    none = ["--mask-update-interval", "none", "--masked-decay", "none"]
    launch(folder / "dense", [*TINY, *data, "--sparsity-recipe", "dense", *none])
    return ["--load", str(folder / "dense"), "--finetune"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [_bert, _conversations, _retrained])
def test_a_run_of_its_kind_trains_on_a_gpu(tmp_path, kind):
    needs_transformer_engine(torch.device("cuda"))
    rows = launch(tmp_path / "run", [*TINY, *kind(tmp_path)])
    assert len(rows) == 6 and all(math.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] and all(row["sparse"] for row in rows)
