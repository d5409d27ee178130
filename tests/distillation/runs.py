"""Flags of tiny runs: a dense one, and its retraining to 2:4."""

from __future__ import annotations

from tests.runs import TINY

ALL_LINEARS = ["--sparse-layers", "*.self_attention.linear_*", "*.mlp.linear_*"]
# 128 tokens are padded to 144: the padding is no multiple of any rank's share. The last of the 128
# ends a document, and is in the data.
MODEL = [
    *TINY, "--hidden-size", "32", "--seq-length", "16", "--make-vocab-size-divisible-by", "144",
    "--global-batch-size", "8", "--masked-decay", "none", "--mask-update-interval", "none",
]  # fmt: skip
DENSE = [*MODEL, "--sparsity-recipe", "dense", "--train-iters", "60", "--lr", "1e-2"]
AST = [
    *MODEL, *ALL_LINEARS, "--sparsity-recipe", "ast", "--mask-update-interval", "4",
    "--masked-decay", "1e-4", "--masked-decay-ramp-iters", "5", "--lr", "3e-4",
    "--train-iters", "10", "--finetune",
]  # fmt: skip
TEACHER = ["--kd-loss-weight", "0.67", "--lm-loss-weight", "0.33"]
