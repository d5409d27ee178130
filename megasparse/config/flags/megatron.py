"""What becomes of the flags of Megatron-LM and Megatron-DeepSpeed that are not flags here: a table.

A flag that is a field of the configuration means the same in both, and has no row. Each other flag
is translated into flags of ours, has nothing to do here, or is missing, with the reason and what
helps instead (`missing.py`). `docs/megatron.md` prints the table, and `command_line.py`
follows it.

Notation: `--flag` has no value, `--flag=` has one, `--flag=*` any number of them. Of
`--flag=a|b` the values a and b alone are as the row says, others are missing.
"""

from __future__ import annotations

# What becomes of it ({} is its value), and why.
TRANSLATED = (
    ("--use-distributed-optimizer", "--zero-stage 1", "state divided over the replicas"),
    ("--data-parallel-sharding-strategy=no_shard", "--zero-stage 0", "DeepSpeed's name"),
    ("--data-parallel-sharding-strategy=optim", "--zero-stage 1", "DeepSpeed's name"),
    ("--data-parallel-sharding-strategy=optim_grads", "--zero-stage 2", "DeepSpeed's name"),
    ("--data-parallel-sharding-strategy=optim_grads_params", "--zero-stage 3", "DeepSpeed's name"),
    ("--fp16", "--bf16", "as fast, and needs no loss scale; there is no FP16 here"),
    ("--recompute-activations", "--recompute-granularity selective", "its newer name"),
    ("--checkpoint-activations", "--recompute-granularity full", "its newer name"),
    ("--checkpoint-num-layers=", "--recompute-num-layers {}", "its newer name"),
    ("--use-rotary-position-embeddings", "--position-embedding-type rope", "its newer name"),
    ("--rotary-position-embeddings-theta=", "--rotary-base {}", "Megatron-LM's name"),
    ("--layernorm-epsilon=", "--norm-epsilon {}", "Megatron-LM's name"),
    ("--encoder-num-layers=", "--num-layers {}", "there is one stack of layers"),
    ("--decoder-num-layers=", "--num-layers {}", "there is one stack of layers"),
    ("--encoder-seq-length=", "--seq-length {}", "there is one stack of layers"),
    ("--decoder-seq-length=", "--seq-length {}", "there is one stack of layers"),
    ("--batch-size=", "--micro-batch-size {}", "its newer name"),
    ("--model-parallel-size=", "--tensor-model-parallel-size {}", "its newer name"),
    ("--fp8-hybrid", "--fp8-format hybrid", "its newer name"),
    ("--fp8-e4m3", "--fp8-format e4m3", "its newer name"),
    ("--pretrained-checkpoint=", "--load {} --finetune", "weights alone"),
    ("--bert-no-binary-head", "--no-bert-binary-head", "its opposite"),
    ("--load-teacher=", "--teacher-load {}", "with --kd-loss-weight"),
    ("--kd-temp=", "--kd-temperature {}", "with --kd-loss-weight"),
    ("--persistent-save-interval=", "--save-interval {}", "every checkpoint stays on disk"),
    ("--check-weight-hash-across-dp-replicas-interval=", "--replica-check-interval {}",
     "masks and scales are compared too"),
    ("--no-position-embedding", "--position-embedding-type rope", "as Megatron asks for"),
    ("--enable-cuda-graph", "--cuda-graph-impl local", "its newer name"),
    ("--external-cuda-graph", "--cuda-graph-impl local", "one kind of graphs"),
    ("--logging-level=10", "--log-level debug", "a name for the number"),
    ("--logging-level=20", "--log-level info", "a name for the number"),
    ("--logging-level=30", "--log-level warning", "a name for the number"),
    ("--logging-level=40", "--log-level error", "a name for the number"),
    ("--grad-reduce-in-bf16", "--no-accumulate-allreduce-grads-in-fp32", "its opposite"),
    ("--main-grads-dtype=bf16", "--no-accumulate-allreduce-grads-in-fp32", "its opposite"),
    ("--override-opt-param-scheduler", "--override-schedule", "the flags' values win"),
    ("--override-opt_param-scheduler", "--override-schedule", "its older spelling"),
)  # fmt: skip

# Why nothing has to be done; the flags.
NOTHING = (
    ("the layers are megatron-core's in every run",
     "--use-mcore-models --no-bias-gelu-fusion --no-bias-swiglu-fusion "
     "--no-bias-dropout-fusion --no-masked-softmax-fusion --no-rope-fusion "
     "--no-persist-layer-norm --cross-entropy-loss-fusion --cross-entropy-fusion-impl= "
     "--disable-jit-fuser --no-gradient-accumulation-fusion --disable-mem-efficient-ln "
     "--use-te-activation-func --te-rng-tracker --inference-rng-tracker "
     "--no-async-tensor-model-parallel-allreduce --disable-async-tensor-model-parallel-allreduce "
     "--no-scatter-gather-tensors-in-pipeline --no-clone-scatter-output-in-embedding "
     "--disable-clone-scatter-output-in-embedding --num-dataset-builder-threads= "
     "--fp16-lm-cross-entropy --enable-experimental"),
    ("attention takes the fastest kernel there is (--transformer-impl chooses)",
     "--attention-backend=auto|flash|fused|unfused|local --use-flash-attn --use-flash-attn-v1 "
     "--use-flash-attn-v2 --use-flash-attn-triton --use-flash-attn-builder"),
    ("it is so in every run",
     "--attention-softmax-in-fp32 --no-query-key-layer-scaling --log-throughput "
     "--exit-signal-handler --log-progress --no-data-sharding "
     "--no-create-attention-mask-in-dataloader "
     "--deepspeed --use-pin-memory --no-one-logger"),
    ("initial weights are drawn by the parameter's name, on every device alike",
     "--use-cpu-initialization --init-model-with-meta-device"),
    ("a batch that does not divide is refused, and the message has the sizes",
     "--decrease-batch-size-if-needed"),
    ("selective recomputation recomputes it", "--recompute-modules=core_attn"),
    ("norms have float32 masters and no weight decay, so 1 + w trains as w does",
     "--apply-layernorm-1p"),
    ("every sample has --seq-length tokens, so the mean over micro-batches is that over tokens; "
     "with --sft it is the mean over the answers' tokens",
     "--calculate-per-token-loss"),
    ("communication is hidden where that is possible",
     "--overlap-grad-reduce --overlap-param-gather --overlap-param-gather-with-optimizer-step "
     "--no-align-grad-reduce --no-align-param-gather --overlap-p2p-communication "
     "--no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush "
     "--tp-comm-overlap --tp-comm-overlap-cfg= --tp-comm-overlap-rs-dgrad "
     "--tp-comm-bootstrap-backend= --no-tp-comm-bulk-dgrad --no-tp-comm-bulk-wgrad "
     "--no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --no-tp-comm-split-ag "
     "--no-tp-comm-split-rs --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad "
     "--disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs --disable-tp-comm-split-ag "
     "--disable-tp-comm-split-rs --delay-wgrad-compute --defer-embedding-wgrad-compute "
     "--wgrad-deferral-limit= --ddp-average-in-collective --no-gradient-reduce-div-fusion "
     "--ddp-pad-buckets-for-high-nccl-busbw --ddp-num-buckets= --use-ring-exchange-p2p "
     "--high-priority-stream-groups=* --create-all-gather-group"),
    ("packed FP8 operands are kept from step to step, parameters are gathered in BF16",
     "--fp8-param-gather --keep-fp8-transpose-cache --fp8-interval="),
    ("memory is allocated once, and garbage is collected where no rank waits",
     "--manual-gc --manual-gc-interval= --no-manual-gc-eval --disable-manual-gc-eval "
     "--empty-unused-memory-level= --train-sync-interval= "
     "--distribute-saved-activations --cuda-graph-warmup-steps="),
    ("the backend follows from the device",
     "--distributed-backend=nccl|gloo --disable-gloo-process-groups --DDP-impl=local|torch "
     "--no-contiguous-buffers-in-local-ddp --lazy-mpu-init= "
     "--pipeline-model-parallel-comm-backend= "
     "--disable-symmetric-registration"),
    ("conversations are in the tokenizer's own chat template",
     "--sft-tokenizer-prompt-format=default"),
    ("it is 1 here",
     "--ds-sequence-parallel-size=1 --moe-expert-parallel-size=1 --topk= "
     "--num-distributed-optimizer-instances=1 --mlp-type=standard "
     "--pipeline-model-parallel-split-rank=0 --num-virtual-stages-per-pipeline-rank=1"),
    ("it is what this optimizer does",
     "--optimizer=adam --main-grads-dtype=fp32 --main-params-dtype=fp32 --exp-avg-dtype=fp32 "
     "--exp-avg-sq-dtype=fp32 --ds-fused-adam --optimizer-cuda-graph "
     "--weight-decay-incr-style=constant "
     "--lr-warmup-init=0|0.0 --sgd-momentum="),
    ("BF16 needs no loss scale",
     "--loss-scale= --initial-loss-scale= --min-loss-scale= --loss-scale-window= --hysteresis= "
     "--no-log-loss-scale-to-tensorboard --disable-log-loss-scale-to-tensorboard"),
    ("datasets are Megatron's, mapped into memory, and their indices are cached",
     "--data-impl=mmap|infer --no-mmap-bin-files --mmap-warmup --dataloader-type=single "
     "--dataloader-fast-cache-load --dataloader-defer-npy-index-mmap --repeated-dataloader "
     "--mid-level-dataset-surplus= --tiktoken-pattern= --tiktoken-num-special-tokens= "
     "--tokenizer-hf-use-fast --vocab-extra-ids=0 --legacy-tokenizer"),
    ("checkpoints have one format, which every layout writes and reads in parallel",
     "--ckpt-format= --dist-ckpt-format= --use-dist-ckpt --auto-detect-ckpt-format "
     "--ckpt-fully-parallel-save --ckpt-fully-parallel-load --no-ckpt-fully-parallel-save "
     "--disable-ckpt-fully-parallel-save --ckpt-assume-constant-structure "
     "--ckpt-drop-redundant-extra-state --dist-ckpt-workers= "
     "--dist-ckpt-strictness= --dist-ckpt-optim-fully-reshardable "
     "--distrib-optim-fully-reshardable-mem-efficient --dist-ckpt-save-pre-mcore-014 "
     "--use-persistent-ckpt-worker --universal-checkpoint --load-main-params-from-ckpt"),
    ("sizes and schedule are compared with the checkpoint's, and a difference is named",
     "--use-checkpoint-args --use-mp-args-from-checkpoint-args "
     "--use-checkpoint-opt-param-scheduler --use-checkpoint-opt_param-scheduler "
     "--no-use-tokenizer-model-from-checkpoint-args "
     "--disable-use-tokenizer-model-from-checkpoint-args"),
    ("a step that is not finite is found, named and not made",
     "--rerun-mode= --no-check-for-nan-in-loss-and-grad --check-for-spiky-loss "
     "--check-for-large-grads --result-rejected-tracker-filename="),
    ("ranks are watched, and --max-restarts starts them again",
     "--enable-ft-package --calc-ft-timeouts --ft-num-warmup-iters= --inprocess-restart "
     "--inprocess-max-iterations= --inprocess-monitor-thread-interval= "
     "--inprocess-monitor-process-interval= --inprocess-progress-watchdog-interval= "
     "--inprocess-heartbeat-interval= --inprocess-heartbeat-timeout= --inprocess-soft-timeout= "
     "--inprocess-hard-timeout= --inprocess-barrier-timeout= --inprocess-completion-timeout= "
     "--inprocess-last-call-wait= --inprocess-termination-grace-time= --inprocess-granularity= "
     "--inprocess-active-world-size= --inprocess-empty-cuda-cache "
     "--exit-signal-handler-for-dataloader"),
    ("it is among the metrics of every run (docs/metrics.md)",
     "--log-timers-to-tensorboard --log-memory-to-tensorboard --log-memory-interval= "
     "--log-batch-size-to-tensorboard --log-world-size-to-tensorboard "
     "--log-validation-ppl-to-tensorboard --log-device-memory-used --tensorboard-log-interval= "
     "--tensorboard-queue-size= --timing-log-level= --timing-log-option= "
     "--no-barrier-with-level-1-timing --log-straggler --straggler-minmax-count="),
    ("it is not measured; docs/metrics.md has what is",
     "--log-energy --log-num-zeros-in-grad --log-params-norm --log-max-attention-logit "
     "--log-optimizer-states-to-tensorboard --no-log-learnig-rate-to-tensorboard"),
    ("one stage is no pipeline", "--no-pipeline-parallel"),
    ("activations are recomputed as --recompute-granularity says",
     "--deepspeed-activation-checkpointing --partition-activations --contigious-checkpointing "
     "--synchronize-each-layer --distribute-checkpointed-activations --profile-backward"),
    ("one-logger is not used",
     "--one-logger-project= --one-logger-run-name= --one-logger-async --app-tag-run-name= "
     "--app-tag-run-version="),
    ("no tensor of inference is made in training",
     "--inference-max-batch-size= --inference-max-seq-length= --inference-max-requests= "
     "--inference-batch-times-seqlen-threshold= --max-tokens-to-oom= --flash-decode"),
)  # fmt: skip

# Other spellings of the values of flags that both have.
VALUES = {
    "--cuda-graph-impl": {"transformer_engine": "local"},
    "--normalization": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"},
    "--tokenizer-type": {
        "GPT2BPETokenizer": "HuggingFaceTokenizer",
        "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
        "Llama2Tokenizer": "SentencePieceTokenizer",
        "PretrainedFromHF": "HuggingFaceTokenizer",
    },
}
