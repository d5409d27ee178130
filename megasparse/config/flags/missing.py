"""Flags of Megatron-LM and Megatron-DeepSpeed that are not here: why, and what helps instead.

The notation is that of `megatron.py`. A flag that is there with some of its
values is here with the others.
"""

from __future__ import annotations

# Why it is not here and what helps instead; the flags.
MISSING = (
    ("sequences are divided over ranks by --context-parallel-size",
     "--hierarchical-context-parallel-sizes=* --hybrid-context-parallel "
     "--max-seqlen-per-dp-cp-rank= --ds-sequence-parallel-size= --force-ds-sequence-parallel "
     "--ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-chunk-size= "
     "--ds-sequence-parallel-fpdt-offloading"),
    ("experts are megatron-core's, dropless, of one width: --num-experts, --moe-router-topk",
     "--moe-expert-parallel-size= --mlp-type= --num-experts-switch= --num-experts-teacher=* "
     "--expert-interval= --enable-expert-tensor-parallelism --create-moe-param-group --use-tutel "
     "--mos --disable-moe-token-dropping --disable-moe-top2-2nd-expert-sampling "
     "--moe-eval-capacity-factor= --moe-expert-capacity-factor= --moe-min-capacity= "
     "--moe-pad-expert-input-to-capacity --moe-pad-experts-for-cuda-graph-inference "
     "--moe-token-drop-policy= --moe-train-capacity-factor= --moe-latent-size= --moe-extended-tp "
     "--moe-upcycling-granularity= --moe-use-upcycling --moe-input-jitter-eps= --moe-loss-coeff="),
    ("a token's experts are its most probable ones, by a softmax: --moe-router-pre-softmax, "
     "--moe-router-load-balancing-type",
     "--moe-enable-routing-replay --moe-router-bias-update-rate= --moe-router-enable-expert-bias "
     "--moe-router-force-load-balancing --moe-router-group-topk= --moe-router-num-groups= "
     "--moe-router-score-function= --moe-router-topk-scaling-factor= --moe-apply-probs-on-input"),
    ("tokens get to their experts by --moe-token-dispatcher-type alltoall or allgather",
     "--moe-deepep-num-sms= --moe-enable-deepep --moe-flex-dispatcher-backend= "
     "--moe-hybridep-num-sms= --moe-layer-recompute --moe-per-layer-logging "
     "--moe-permute-fusion --moe-router-fusion --moe-router-padding-for-fp8 "
     "--moe-router-padding-for-quantization --moe-shared-expert-overlap "
     "--moe-use-legacy-grouped-gemm --overlap-moe-expert-parallel-comm "
     "--ep-overlap-early-attn-memory-release --use-fused-weighted-squared-relu"),
    ("DeepSpeed's PipelineModule gives a rank one run of layers, and its schedule is 1F1B; "
     "tools/estimate.py prints the bubble of both, docs/parallelism.md says more",
     "--num-layers-per-virtual-pipeline-stage= --num-virtual-stages-per-pipeline-rank= "
     "--microbatch-group-size-per-virtual-pipeline-stage="),
    ("stages hold layers that follow each other; give --pipeline-model-parallel-size and "
     "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers",
     "--pipeline-model-parallel-layout= "
     "--enable-zbh1-pipeline --enable-zbh1-exact-semantics --pipeline-model-parallel-split-rank= "
     "--standalone-embedding-stage --account-for-embedding-in-pipeline-split "
     "--account-for-loss-in-pipeline-split"),
    ("masks and packed weights need optimizer state and parameters on the device; "
     "--zero-stage and --recompute-granularity save memory",
     "--optimizer-cpu-offload --optimizer-offload-fraction= --use-torch-optimizer-for-cpu-offload "
     "--overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --no-pin-cpu-params --cpu-optimizer "
     "--cpu-torch-adam --remote-device= --cpu-offloading-num-layers= "
     "--fine-grained-activation-offloading --offload-modules=* --min-offloaded-tensor-size= "
     "--checkpoint-in-cpu --memory-centric-tiled-linear --tile-factor= --split-transformers "
     "--scattered-embeddings"),
    ("DeepSpeed's ZeRO divides the state: --zero-stage",
     "--use-megatron-fsdp --use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward "
     "--data-parallel-sharding-strategy= --outer-dp-sharding-strategy= "
     "--enable-full-sharding-in-hsdp --fsdp-double-buffer --fsdp-manual-registration "
     "--suggested-communication-unit-size= --num-distributed-optimizer-instances= "
     "--no-strict-fsdp-dtensor-load --disable-strict-fsdp-dtensor-load "
     "--ddp-reduce-scatter-with-fp32-accumulation "
     "--ddp-param-name-patterns-for-fp32-local-accumulation=* "
     "--fsdp-db-use-persist-buf-on-alloc-fail --no-use-layer-wise-param-layout"),
    ("the optimizer is AdamW, with float32 moments and masters",
     "--optimizer= --use-precision-aware-optimizer --main-params-dtype= --exp-avg-dtype= "
     "--exp-avg-sq-dtype= --muon-extra-scale-factor= --muon-fp32-matmul-prec= --muon-momentum= "
     "--muon-no-split-qkv --muon-num-ns-steps= --muon-scale-mode= --muon-tp-mode= "
     "--muon-use-nesterov --qk-clip --qk-clip-alpha= --qk-clip-threshold= --head-lr-mult= "
     "--lion-beta1= --lion-beta2="),
    ("weight decay is constant, and not on norms and biases: --weight-decay",
     "--start-weight-decay= --end-weight-decay= --weight-decay-incr-style= "
     "--no-weight-decay-cond-type= --apply-wd-to-qk-layernorm"),
    ("warm-up starts from 0: --lr-warmup-iters or --lr-warmup-fraction",
     "--lr-warmup-init= --warmup="),
    ("a run is as long as its steps or its samples: --train-iters, --train-samples",
     "--train-tokens= --lr-decay-tokens= --lr-warmup-tokens= "
     "--train-data-exact-num-epochs= --iterations-to-skip=* --phase-transition-iterations="),
    ("attention is softmax attention with grouped queries, windows, rotary embeddings and QK norms",
     "--multi-latent-attention --q-lora-rank= --kv-lora-rank= --qk-head-dim= "
     "--qk-pos-emb-head-dim= --v-head-dim= --cache-mla-latents --rope-type= --mscale= "
     "--rotary-scaling-factor= "
     "--mscale-all-dim= --mrope-section=* "
     "--attention-output-gate --experimental-attention-variant= --dsa-indexer-head-dim= "
     "--dsa-indexer-loss-coeff= --dsa-indexer-n-heads= --dsa-indexer-topk= "
     "--dsa-indexer-use-sparse-loss --linear-attention-freq= --linear-conv-kernel-dim= "
     "--linear-key-head-dim= --linear-num-key-heads= --linear-num-value-heads= "
     "--linear-value-head-dim= --softmax-type= --use-kitchen-attention "
     "--kitchen-attention-backend= --relative-attention-max-distance= "
     "--relative-attention-num-buckets= --rotary-interleaved "
     "--rotary-seq-len-interpolation-factor= --attention-backend= "
     "--apply-query-key-layer-scaling "
     "--qk-l2-norm "
     "--mla-down-proj-fusion --dataloader-inter-document-masking"),
    ("activations are GELU (tanh, or --exact-gelu), --swiglu, --geglu, --relu or --squared-relu",
     "--quick-geglu --openai-gelu --onnx-safe= --activation-func-clamp-value= "
     "--glu-linear-offset="),
    ("weights start from normal numbers: --init-method-std",
     "--init-method-xavier-uniform --embedding-init-method-std= --no-initialization "
     "--data-parallel-random-init"),
    ("layers are those of GPT and LLaMA, one like the other",
     "--spec=* --heterogeneous-layers-config-path= --heterogeneous-layers-config-encoded-json= "
     "--apply-residual-connection-post-layernorm --fp32-residual-connection "
     "--embedding-weights-in-fp32 --mtp-num-layers= --mtp-loss-scaling-factor= --mtp-standalone "
     "--is-hybrid-model --hybrid-attention-ratio= --hybrid-mlp-ratio= "
     "--hybrid-override-pattern= --mamba-head-dim= --mamba-num-groups= --mamba-num-heads= "
     "--mamba-state-dim= --disable-mamba-mem-eff-path --use-legacy-models "
     "--padded-vocab-size= --symmetric-ar-type= --batch-invariant-mode "
     "--disable-bf16-reduced-precision-matmul --random-ltd "
     "--hybrid-layer-pattern= --output-logit-dtype="),
    ("8 bits are for the GEMMs of chosen layers: --fp8-format, --sparse-layers",
     "--fp4-format= --fp4-param-gather --fp4-quantizer-factory= --fp4-recipe= "
     "--fp8-quantizer-factory= --first-last-layers-bf16 --num-layers-at-start-in-bf16= "
     "--num-layers-at-end-in-bf16= --no-fp8-wgrad --disable-fp8-wgrad "
     "--te-precision-config-file= --reuse-grad-buf-for-mxfp8-param-ag"),
    ("CUDA graphs hold the passes of layers: --cuda-graph-impl local",
     "--cuda-graph-scope=* "
     "--cuda-graph-modules=*"),
    ("what is recomputed is chosen by --recompute-granularity", "--recompute-modules=*"),
    ("name datasets and weights with --data-path, or --train-data-path and --valid-data-path",
     "--data-args-path= --per-split-data-args-path= --per-dataset-sequences-path= "
     "--data-impl= --dataloader-type= --object-storage-cache-path= "
     "--aml-data-download-path= --train-desc-path= --train-doc-idx-path= --train-idx-path= "
     "--train-sample-idx-path= --train-shuffle-idx-path= --return-data-index "
     "--use-dataset-only= --disable-msc "
     "--enable-msc"),
    ("the order of samples is a function of --seed",
     "--data-efficiency-curriculum-learning --sample-rate= --data-per-class-fraction= "
     "--classes-fraction= --iter-per-epoch="),
    ("documents are taken as they are, cut into samples of --seq-length",
     "--fim-data --fim-eod-token= --fim-fragment-rate= --fim-middle-token= --fim-no-prefix= "
     "--fim-pad-token= --fim-prefix-token= --fim-rate= --fim-split-sample= --fim-spm-rate= "
     "--fim-suffix-token= --allow-ambiguous-pad-tokens"),
    ("python tools/preprocess_data.py --sft tokenizes conversations, with the tokenizer's own chat "
     "template or --chat-template FILE",
     "--sft-tokenizer-prompt-format="),
    ("tokenizers are SentencePiece models and tokenizer.json files: --tokenizer-model",
     "--tokenizer-hf-include-special-tokens --tokenizer-metadata= "
     "--tokenizer-sentencepiece-legacy --tokenizer-special-tokens=* "
     "--tiktoken-special-tokens=* --vocab-extra-ids= --trust-remote-code"),
    ("a run starts from the newest checkpoint of --load; --finetune takes its weights alone",
     "--ckpt-step= --load-tag= --no-load-optim --no-load-rng --no-load-lr-state --no-save-optim "
     "--no-save-rng "
     "--reset-iteration --skip-train "
     "--override-ckpt-iteration= --freeze-all-layers"),
    ("python tools/convert_checkpoint.py converts checkpoints",
     "--ckpt-convert-format= --ckpt-convert-save= --ckpt-convert-update-legacy-dist-opt-format"),
    ("--keep-last says how many checkpoints stay, --async-save writes them in the background",
     "--non-persistent-ckpt-type= --non-persistent-global-ckpt-dir= "
     "--non-persistent-local-ckpt-algo= --non-persistent-local-ckpt-dir= "
     "--non-persistent-save-interval= --replication --replication-factor= --replication-jump="),
    ("a signal (SIGTERM, SIGINT, SIGUSR1), --exit-interval or --exit-duration-in-mins ends a run",
     "--exit-signal= --kill-switch-file= --adlr-autoresume --adlr-autoresume-interval="),
    ("DeepSpeed's buckets go into --deepspeed_config (reduce_bucket_size, allgather_bucket_size)",
     "--ddp-bucket-size= --zero-allgather-bucket-size= --zero-reduce-bucket-size= "
     "--zero-contigious-gradients --zero-reduce-scatter"),
    ("docs/metrics.md has what is logged",
     "--save-dgrads-interval= --save-wgrads-interval= --config-logger-dir= "
     "--dump-param-to-param-group-map= --straggler-ctrlr-port= --disable-straggler-on-startup "
     "--run-workload-inspector-server --test-mode"),
    ("NCCL is set by its environment variables (NCCL_...)",
     "--nccl-communicator-config-path= --use-nccl-ub --use-sharp --sharp-enabled-group= "
     "--distributed-backend= --DDP-impl= --fake-process-group"),
    ("ranks are numbered tensor first, then data, then pipeline", "--use-tp-pp-dp-mapping"),
    ("--distributed-timeout-minutes holds from start to end",
     "--distributed-timeout-seconds-after-init="),
    ("a YAML file is given by --config", "--yaml-cfg="),
    ("a teacher is given by --teacher-load, its loss by --kd-loss-weight and --lm-loss-weight",
     "--kd --kd-alpha-ce= --kd-beta-ce= --hidden-size-teacher= --num-attention-heads-teacher= "
     "--num-layers-teacher="),
    ("--eval-iters batches are validated on", "--full-validation"),
    ("the fault injector is set by an environment variable, in tests",
     "--error-injection-rate= --error-injection-type="),
    ("launch/generate.py and launch/evaluate.py compute with a trained model",
     "--inference --ds-inference --inference-coordinator-port= --inference-dynamic-batching "
     "--inference-dynamic-batching-block-size= --inference-dynamic-batching-buffer-size-gb= "
     "--inference-dynamic-batching-cuda-graph-max-tokens= "
     "--inference-dynamic-batching-cuda-graph-mixed-prefill-count= "
     "--inference-dynamic-batching-max-requests= --inference-dynamic-batching-max-tokens= "
     "--inference-dynamic-batching-num-cuda-graphs= "
     "--inference-dynamic-batching-paused-buffer-size-gb= "
     "--inference-dynamic-batching-track-paused-request-events "
     "--inference-dynamic-batching-unified-memory-level= --inference-fuse-tp-communication "
     "--inference-logging-step-interval= --inference-wandb-logging --no-inference-wandb-logging "
     "--decode-only-cuda-graphs --enable-chunked-prefill --disable-chunked-prefill "
     "--mlp-chunks-for-prefill= --nccl-all-reduce-for-prefill --use-legacy-static-engine "
     "--output-bert-embeddings --bert-embedder-type= "
     "--num-speculative-tokens= --use-same-sampling-seed-across-dp-ranks"),
    ("models are pre-trained here, not trained by reinforcement",
     "--perform-rl-step --grpo-clamp-eps-lower= --grpo-clamp-eps-upper= "
     "--grpo-entropy-term-weight= --grpo-filter-groups-with-same-reward --grpo-group-size= "
     "--grpo-iterations= --grpo-kl-beta= --grpo-prompts-per-step= --langrl-env-config= "
     "--langrl-external-server --no-langrl-external-server "
     "--langrl-inference-server-conversation-template= --langrl-inference-server-type= "
     "--refit-method= --rl-default-temperature= --rl-default-top-k= --rl-default-top-p= "
     "--rl-importance-sampling-truncation-coef= --rl-inference-expert-model-parallel-size= "
     "--rl-inference-expert-tensor-model-parallel-size= --rl-inference-logprobs-is-correction "
     "--no-rl-inference-logprobs-is-correction --rl-inference-model-unified-memory-level= "
     "--rl-inference-pipeline-model-parallel-size= --rl-inference-tensor-model-parallel-size= "
     "--rl-offload-inference-model-weights-when-idle "
     "--no-rl-offload-inference-model-weights-when-idle --rl-offload-kv-cache-during-training "
     "--no-rl-offload-kv-cache-during-training --rl-offload-optimizer-during-inference "
     "--rl-parallel-generation-tasks= --rl-partial-rollouts --no-rl-partial-rollouts "
     "--rl-prompts-per-eval= --rl-remove-kv-cache-during-training "
     "--no-rl-remove-kv-cache-during-training --rl-reset-cuda-graphs --no-rl-reset-cuda-graphs "
     "--rl-sequence-packing-algo= --rl-sequence-packing-max-sequences-per-bin= "
     "--rl-skip-bos-token --no-rl-skip-bos-token --rl-training-cuda-graphs "
     "--no-rl-training-cuda-graphs --rl-use-sequence-packing --no-rl-use-sequence-packing "
     "--rl-verify-model-weights-swap --no-rl-verify-model-weights-swap"),
    ("models are GPT, LLaMA and BERT alone (no T5, Retro, retrieval, vision)",
     "--bert-load= --biencoder-projection-dim= "
     "--biencoder-shared-query-context-model --block-data-path= --embedding-path= "
     "--evidence-data-path= --ict-head-size= --ict-load= --indexer-batch-size= "
     "--indexer-log-interval= --query-in-block-prob= --retriever-report-topk-accuracies=* "
     "--retriever-score-scaling --retriever-seq-length= --titles-data-path= "
     "--use-one-sent-docs --retro-add-retriever --retro-cyclic-train-iters= "
     "--retro-encoder-attention-dropout= --retro-encoder-hidden-dropout= "
     "--retro-encoder-layers= --retro-num-neighbors= --retro-num-retrieved-chunks= "
     "--retro-return-doc-ids --retro-workdir= --dino-bottleneck-size= "
     "--dino-freeze-last-layer= --dino-head-hidden-size= --dino-local-crops-number= "
     "--dino-local-img-size= --dino-norm-last-layer --dino-teacher-temp= "
     "--dino-warmup-teacher-temp= --dino-warmup-teacher-temp-epochs= --img-h= --img-w= "
     "--mask-factor= --mask-type= --num-channels= --patch-dim= "
     "--swin-backbone-type= --vision-backbone-type= --vision-pretraining "
     "--vision-pretraining-type="),
)  # fmt: skip

# The same for every flag that begins so and is not in the table: newer versions have more of them.
FAMILIES = (
    (
        "--gtp-",
        "weights are cut by --tensor-model-parallel-size, experts divided by "
        "--expert-model-parallel-size",
    ),
    ("--inference-", "launch/generate.py and launch/evaluate.py compute with a trained model"),
    ("--rl-", "models are pre-trained here, not trained by reinforcement"),
    ("--grpo-", "models are pre-trained here, not trained by reinforcement"),
    ("--langrl-", "models are pre-trained here, not trained by reinforcement"),
    ("--muon-", "the optimizer is AdamW, with float32 moments and masters"),
    ("--mamba-", "layers are those of GPT and LLaMA, one like the other"),
    ("--megatron-fsdp-", "DeepSpeed's ZeRO divides the state: --zero-stage"),
    ("--logits-", "a teacher is given by --teacher-load and computes beside the student"),
    ("--yarn-", "attention is plain (grouped-query attention and rotary embeddings included)"),
    ("--no-yarn-", "attention is plain (grouped-query attention and rotary embeddings included)"),
    ("--kitchen-", "8 bits are for the GEMMs of chosen layers: --fp8-format, --sparse-layers"),
    ("--otel-", "metrics go to files, TensorBoard, --wandb-project and --mlflow-experiment"),
    ("--step-batch-size-", "the batch grows by --rampup-batch-size"),
    ("--retro-", "models are GPT, LLaMA and BERT alone (no T5, Retro, retrieval, vision)"),
    ("--dino-", "models are GPT, LLaMA and BERT alone (no T5, Retro, retrieval, vision)"),
)
