"""The flags of five published scripts of Megatron-LM and Megatron-DeepSpeed, and files for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.data.tokenizers.tokenizer import train_sentencepiece
from tests.runs import make_dataset


@dataclass(frozen=True)
class Script:
    """One script.

    Attributes:
        flags: as they stand in it; d, v, m, c, t, w and ds.json are its files.
        world: GPUs that it is written for.
        layers: of its model.
        json: DeepSpeed's configuration that it writes.
        missing: what is refused of it; nothing else is.
    """

    flags: str
    world: int
    layers: int
    json: dict[str, Any] | None = None
    missing: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        return self.flags.split()

    def argv(self, folder: Path, whole: bool = False) -> list[str]:
        """The command line with files below `folder` (`make_files` makes those that are read).

        Args:
            whole: with what is missing.
        """
        names = {"d", "v", "m", "c", "t", "w"}
        kept, dropping = [], False
        for word in self.words:
            dropping = word in self.missing or (dropping and not word.startswith("--"))
            kept += [word] if whole or not dropping else []
        placed = [str(folder / word) if word in names else word for word in kept]
        if "--tokenizer-model" in placed:
            placed[placed.index("--tokenizer-model") + 1] = str(folder / "m.model")
        return [word.replace("ds.json", str(folder / "ds.json")) for word in placed]


def make_files(script: Script, folder: Path) -> None:
    """What the command line reads: data, tokenizers, DeepSpeed's JSON."""
    make_dataset(folder / "d", documents=200)
    alphabet = [chr(c) for c in range(33, 127)]
    vocab = {token: number for number, token in enumerate([*alphabet, "ab", "<|endoftext|>"])}
    (folder / "v").write_text(json.dumps(vocab | {f"unused{n}": 100 + n for n in range(40)}))
    (folder / "m").write_text("#version: 0.2\na b\n")
    texts = [f"text {n} of a corpus with words {n * n}" for n in range(300)]
    (folder / "m.model").write_bytes(train_sentencepiece(texts, 320))
    if script.json is not None:
        (folder / "ds.json").write_text(json.dumps(script.json))


# After any of them: a model of a few thousand weights, a few steps on one CPU process.
SMALL = [
    "--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4",
    "--num-query-groups", "4", "--ffn-hidden-size", "128", "--kv-channels", "16",
    "--seq-length", "32", "--max-position-embeddings", "32", "--wandb-project", "none",
    "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1",
    "--micro-batch-size", "1", "--global-batch-size", "4", "--eval-iters", "1",
    "--make-vocab-size-divisible-by", "16", "--transformer-impl", "local", "--log-interval", "1",
    "--split", "90,10,0", "--rampup-batch-size", "2", "2", "4",
]  # fmt: skip

PUBLISHED = {
    "gpt3_175b": Script(
        """
        --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048
        --max-position-embeddings 2048 --attention-backend auto --micro-batch-size 1
        --global-batch-size 1536 --rampup-batch-size 16 16 5859375 --train-iters 500000
        --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006
        --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6
        --lr-warmup-fraction .001 --lr-decay-iters 430000 --tensor-model-parallel-size 8
        --pipeline-model-parallel-size 16 --data-path d --vocab-file v --merge-file m
        --split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --save c
        --load c --eval-iters 10 --tensorboard-dir t
        """,
        world=1024,
        layers=96,
    ),
    "llama3_8b_h100_fp8": Script(
        """
        --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
        --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
        --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
        --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0
        --swiglu --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p
        --untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1
        --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748
        --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4
        --decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
        --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion
        --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1
        --exit-duration-in-mins 235 --fp8-format hybrid --fp8-amax-history-len 1024
        --fp8-amax-compute-algo max --fp8-param-gather --tensor-model-parallel-size 1
        --context-parallel-size 1 --sequence-parallel --use-distributed-optimizer
        --overlap-grad-reduce --overlap-param-gather --mock-data --tokenizer-type NullTokenizer
        --vocab-size 128256 --data-cache-path c --tiktoken-pattern v2 --split 99,1,0
        --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1
        --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput
        --profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist
        --distributed-timeout-minutes 60 --save c --load c --tensorboard-dir t
        """,
        world=8,
        layers=32,
    ),
    "gpt3_15b": Script(
        """
        --distributed-timeout-minutes 60 --tensor-model-parallel-size 8
        --pipeline-model-parallel-size 1 --use-distributed-optimizer --overlap-grad-reduce
        --overlap-param-gather --use-mcore-models --sequence-parallel --disable-bias-linear
        --micro-batch-size 4 --rampup-batch-size 384 384 97656250 --global-batch-size 1152
        --train-samples 19531250 --manual-gc --transformer-impl transformer_engine
        --data-cache-path c --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model m
        --data-path d --split 99,1,0 --no-mmap-bin-files --num-workers 6 --apply-layernorm-1p
        --untie-embeddings-and-output-weights --position-embedding-type rope --no-rope-fusion
        --rotary-percent 0.5 --squared-relu --num-layers 32 --hidden-size 6144
        --num-attention-heads 48 --group-query-attention --num-query-groups 8 --seq-length 4096
        --max-position-embeddings 4096 --attention-dropout 0.0 --hidden-dropout 0.0 --clip-grad 1.0
        --weight-decay 0.1 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 4.5e-4
        --min-lr 4.5e-5 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine
        --adam-beta1 0.9 --adam-beta2 0.95 --eval-iters 32 --eval-interval 2000 --save c --load c
        --save-interval 5000 --save-retain-interval 10000 --init-method-std 0.0134
        --log-timers-to-tensorboard --log-memory-to-tensorboard --log-num-zeros-in-grad
        --log-params-norm --log-validation-ppl-to-tensorboard --log-throughput --log-interval 100
        --tensorboard-dir t --wandb-project p --wandb-entity e --wandb-exp-name n --bf16
        --exit-interval 51000 --wandb-save-dir w --async-save --use-persistent-ckpt-worker
        """,
        world=256,
        layers=32,
    ),
    "megatron_deepspeed_llama2": Script(
        """
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers 24
        --hidden-size 2048 --ffn-hidden-size 5504 --num-attention-heads 16 --micro-batch-size 4
        --global-batch-size 32 --seq-length 2048 --max-position-embeddings 2048 --train-iters 250000
        --save c --load c --data-path 1 d --data-impl mmap
        --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model m --split 949,50,1
        --distributed-backend nccl --lr 3e-4 --lr-decay-style cosine --min-lr 3e-5
        --weight-decay 0.1 --clip-grad 1 --lr-warmup-iters 2000 --optimizer adam --adam-beta1 0.9
        --adam-beta2 0.95 --log-interval 1 --save-interval 10000 --eval-interval 1000
        --eval-iters 10 --bf16 --no-query-key-layer-scaling --attention-dropout 0 --hidden-dropout 0
        --use-rotary-position-embeddings --untie-embeddings-and-output-weights --swiglu
        --normalization rmsnorm --disable-bias-linear --num-key-value-heads 4 --wandb-project p
        --wandb-exp-name e --zero-stage=0 --deepspeed_config=ds.json --deepspeed
        """,
        world=8,
        layers=24,
        json={
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 4,
            "steps_per_print": 1,
            "zero_optimization": {"stage": 0},
            "bf16": {"enabled": True},
        },
    ),
    "megatron_deepspeed_bf16": Script(
        """
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
        --ds-sequence-parallel-size 1 --num-layers 24 --hidden-size 1024 --num-attention-heads 32
        --seq-length 1024 --loss-scale 12 --max-position-embeddings 1024 --micro-batch-size 2
        --global-batch-size 16 --train-iters 100000 --lr 6.0e-3 --min-lr 6.0e-4
        --lr-decay-style cosine --log-interval 1 --eval-iters 40 --eval-interval 10 --data-path d
        --vocab-file v --merge-file m --save-interval 100 --split 98,2,0 --clip-grad 1.0
        --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --bf16
        --checkpoint-activations --exit-interval 100 --save c --load c
        --make-vocab-size-divisible-by 256 --tensorboard-dir t --deepspeed
        --deepspeed_config=ds.json --zero-stage=1 --deepspeed-activation-checkpointing
        """,
        world=8,
        layers=24,
        json={
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 2,
            "steps_per_print": 1,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "wall_clock_breakdown": False,
        },
    ),
}
