"""AST end to end from a Hugging Face folder of Qwen3: converted, retrained to 2:4 with the dense
model as teacher on two ranks, exported, and computed by transformers."""

from __future__ import annotations

import json

import torch

from megasparse.kernels import is_24
from tests import dist
from tests.convert.models import TOKENS, load_logits, megasparse_logits, save_model, tensors
from tests.runs import train
from tools import convert_checkpoint, export_sparse

_CONVERT = ["--from", "huggingface", "--to", "megasparse", "--make-vocab-size-divisible-by", "16"]
_TRAIN = [
    "--finetune", "--sparsity-recipe", "ast", "--masked-decay", "6e-3",
    "--masked-decay-ramp-iters", "2", "--mask-update-interval", "2",
    "--sparse-layers", "*.self_attention.linear_*", "*.mlp.linear_*",
    "--kd-loss-weight", "1", "--lm-loss-weight", "0", "--kd-temperature", "2",
    "--tensor-model-parallel-size", "2",
    "--sequence-parallel", "--seq-length", "16", "--micro-batch-size", "2",
    "--global-batch-size", "4", "--train-iters", "12", "--lr", "2e-3", "--lr-warmup-iters", "1",
    "--split", "90,10,0", "--eval-iters", "0", "--dense-tail-fraction", "0",
]  # fmt: skip


def test_ast_from_a_qwen3_of_hugging_face(tmp_path, dataset):
    dense = save_model(tmp_path / "hf", "qwen3", "10MB")
    paths = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "start")]
    assert convert_checkpoint.main([*_CONVERT, *paths]) == 0
    config = [
        "--config",
        str(tmp_path / "start" / "config.yaml"),
        "--load",
        str(tmp_path / "start"),
    ]
    where = ["--data-path", dataset, "--run-dir", str(tmp_path / "run")]
    rows = dist.run(train, 2, [*config, *_TRAIN, *where])[0]
    # The pruned model comes closer to its teacher again.
    first, last = rows[0]["kd_loss"], rows[-1]["kd_loss"]
    assert first > 0.01 and last < 0.9 * first, (first, last)

    exported = tmp_path / "exported"
    assert export_sparse.main(["--input", str(tmp_path / "run"), "--output", str(exported)]) == 0
    described = json.loads((exported / "config.json").read_text())
    assert described["architectures"] == ["Qwen3ForCausalLM"] and described["head_dim"] == 12
    linears = [name for name in tensors(exported) if "_proj" in name]
    assert len(linears) == 4 * 7 and all(is_24(tensors(exported)[name]) for name in linears)
    logits = load_logits(exported, torch.tensor(TOKENS))
    ours = dist.run(megasparse_logits, 1, str(tmp_path / "run" / "checkpoints"))[0]
    torch.testing.assert_close(logits, ours, atol=1e-4, rtol=1e-4)
    assert (logits - dense).abs().max() > 0.1
