"""The groups of the configuration that say how the model is trained: on which ranks, by which
steps, on what data, against which teacher."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config.schema.option import option


@dataclass
class ParallelConfig:
    """How the model and its state are divided over ranks."""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer", at_least=1)
    pipeline_model_parallel_size: int = option(1, "pipeline stages", at_least=1)
    expert_model_parallel_size: int = option(
        1, "data-parallel ranks that share the experts of a layer", at_least=1
    )
    expert_tensor_parallel_size: int | None = option(
        None,
        "ranks that share each expert; default, and alone supported: as every other layer",
        at_least=1,
    )
    moe_token_dispatcher_type: str = option(
        "alltoall",
        "how tokens get to the ranks of their experts; each rank sends a token where it is wanted "
        "(alltoall), or all ranks get all tokens (allgather)",
        choices=("alltoall", "allgather"),
    )
    moe_grouped_gemm: bool = option(
        False,
        "on GPUs, one launch for the dense GEMMs of all experts of a layer instead of one for each",
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "layers of the first stage; default: as many as the others", at_least=1
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "layers of the last stage; default: as many as the others", at_least=1
    )
    context_parallel_size: int = option(
        1,
        "ranks that share each sequence, two chunks of it on each; sequences stay whole with 1",
        at_least=1,
    )
    cp_comm_type: str = option(
        "p2p",
        "how Transformer Engine's attention exchanges keys and values with context_parallel_size: "
        "from rank to rank while it computes (p2p) or all at once (all_gather)",
        choices=("p2p", "all_gather"),
    )
    sequence_parallel: bool = option(False, "split norms and residuals over the sequence (with TP)")
    tp_comm_peer_memory: bool = option(
        True,
        "with sequence_parallel: GPUs of one host exchange activations through memory that they "
        "open to each other; off, or where they cannot: through NCCL",
    )
    zero_stage: int | None = option(
        None, "DeepSpeed ZeRO stage; default 0 in fp32, 1 in bf16", choices=(0, 1, 2, 3)
    )
    accumulate_allreduce_grads_in_fp32: bool = option(
        True,
        "add gradients up over micro-batches and reduce them over data-parallel ranks in float32; "
        "off: in the dtype of the weights",
    )
    recompute_granularity: str | None = option(
        None,
        "what is computed again in the backward pass to save memory: whole layers (full) or "
        "attention without its linears (selective); default: nothing",
        choices=("full", "selective"),
    )
    recompute_method: str | None = option(
        None,
        "full: every chunk of recompute-num-layers keeps its input alone (uniform, the "
        "default), or only the first recompute-num-layers of a stage are recomputed (block)",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = option(
        None, "layers in a chunk, or to recompute (see recompute-method); default 1", at_least=1
    )
    replica_check_interval: int = option(
        100, "steps between comparisons of replicas over ranks; 0: never", at_least=0
    )
    distributed_timeout_minutes: float = option(
        10.0, "a collective that takes longer ends the run", above=0.0, below=1e6
    )
    hang_timeout: float = option(
        60.0,
        "seconds without progress after which a rank is taken to hang in a step or an evaluation; "
        "5 times as long in a save, 20 times while indices and model are built, a checkpoint is "
        "loaded, in the first step, between batches of tasks and in the report; 0: never. Time in "
        "which all are suspended does not count",
        at_least=0.0,
    )
    listen_on_all_interfaces: bool = option(
        False,
        "let rank 0's store listen on every interface of its host, for whoever reaches it, in "
        "place of MASTER_ADDR's or MEGASPARSE_LISTEN_ADDR's alone",
    )
    deepspeed_config: str | None = option(
        None,
        "JSON file with more of DeepSpeed's settings (buckets, profilers); it may not "
        "contradict the flags",
        path="read",
    )
    preflight: str = option(
        "fast",
        "what is checked of the hosts before the run is built: versions, data, memory, "
        "disk and clocks (fast), also GPUs and bandwidth (full)",
        choices=("off", "fast", "full"),
    )
    preflight_min_bandwidth: float = option(
        0.0,
        "GB/s of all-reduce below which a full preflight fails; 0: it only tells",
        at_least=0.0,
    )


@dataclass
class TrainConfig:
    """Batch, length, optimizer and precision."""

    micro_batch_size: int = option(1, "sequences a rank computes at once", at_least=1)
    global_batch_size: int | None = option(
        None, "sequences in an optimizer step; default micro-batch x data parallel", at_least=1
    )
    rampup_batch_size: list[str] | None = option(
        None,
        "START INCREMENT SAMPLES: the batch grows from START by INCREMENT at a time over the first "
        "SAMPLES samples; default: it does not",
    )
    train_iters: int | None = option(
        None, "optimizer steps; default 100, or those of train-samples", at_least=1
    )
    train_samples: int | None = option(
        None,
        "length of the run in sequences, instead of train-iters; the learning rate's schedule is "
        "in samples too, by lr-decay-samples and its like",
        at_least=1,
    )
    lr: float = option(3e-4, "peak learning rate", above=0.0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", at_least=0.0)
    decoupled_lr: float | None = option(
        None, "peak learning rate of word embedding and output layer; default: lr", above=0.0
    )
    decoupled_min_lr: float | None = option(
        None, "theirs at the end of the decay; default: min-lr", at_least=0.0
    )
    lr_decay_style: str = option(
        "cosine",
        "shape of the decay; WSD: warm-up, stable, and a decay over the last lr-wsd-decay-iters",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = option(
        None,
        "step at which the decay ends; default train-iters, less lr-linear-to-zero-iters",
        at_least=1,
    )
    lr_wsd_decay_style: str = option(
        "exponential",
        "shape of the decay of WSD",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = option(None, "steps of the decay of WSD", at_least=1)
    lr_linear_to_zero_iters: int = option(
        0,
        "last steps of the run, in which the learning rate falls linearly to 0 from where the "
        "decay has brought it (AST)",
        at_least=0,
    )
    lr_warmup_iters: int = option(0, "steps of linear warm-up", at_least=0)
    lr_decay_samples: int | None = option(
        None, "like lr-decay-iters, with train-samples", at_least=1
    )
    lr_wsd_decay_samples: int | None = option(
        None, "like lr-wsd-decay-iters, with train-samples", at_least=1
    )
    lr_linear_to_zero_samples: int = option(
        0, "like lr-linear-to-zero-iters, with train-samples", at_least=0
    )
    lr_warmup_samples: int = option(0, "like lr-warmup-iters, with train-samples", at_least=0)
    lr_warmup_fraction: float | None = option(
        None,
        "warm-up as a share of lr-decay-iters (or -samples), instead of lr-warmup-iters",
        at_least=0.0,
        below=1.0,
    )
    weight_decay: float = option(
        0.1, "decoupled weight decay (not on biases and norms)", at_least=0.0
    )
    adam_beta1: float = option(0.9, "decay of the first moment", at_least=0.0, below=1.0)
    adam_beta2: float = option(0.95, "decay of the second moment", at_least=0.0, below=1.0)
    adam_eps: float = option(1e-8, "epsilon of AdamW", above=0.0)
    clip_grad: float = option(1.0, "global gradient norm to clip to; 0: off", at_least=0.0)
    seed: int = option(1234, "seed of weights, data order, dropout and MVUE", at_least=0)
    bf16: bool = option(False, "bfloat16 weights and activations with float32 masters")
    deterministic_mode: bool = option(
        False, "on GPUs: sums in a fixed order, so that a run repeats bit for bit; slower"
    )
    cuda_graph_impl: str = option(
        "local",
        "on GPUs: capture the passes of each layer in CUDA graphs and replay them (local), or run "
        "all eagerly (none); what cannot be captured runs eagerly, and the log says why",
        choices=("none", "local"),
    )
    transformer_impl: str | None = option(
        None,
        "attention, norms and rotary embedding: Transformer Engine's or torch's (local); "
        "default: Transformer Engine's in bf16 on a GPU, where it is installed",
        choices=("local", "transformer_engine"),
    )
    exit_interval: int | None = option(
        None, "save and stop at the first step divisible by this", at_least=1
    )
    exit_duration_in_mins: float | None = option(
        None, "save and stop at the first step after this many minutes", above=0.0
    )
    max_skipped_steps: int = option(
        0,
        "steps in a row that may be skipped for a NaN or infinity before the run ends",
        at_least=0,
    )


@dataclass
class DataConfig:
    """Where tokens come from."""

    data_path: list[str] = option(
        [], "dataset prefixes, or pairs of weight and prefix: 0.7 a 0.3 b", path="read"
    )
    train_data_path: list[str] = option([], "like data-path, for training alone", path="read")
    valid_data_path: list[str] = option([], "like data-path, for validation alone", path="read")
    multiple_validation_sets: bool = option(
        False, "validate on each dataset of valid-data-path by itself; each has its curve"
    )
    test_data_path: list[str] = option([], "like data-path, for testing alone", path="read")
    split: str = option(
        "969,30,1", "shares of training, validation and test in data-path", joined=","
    )
    mock_data: bool = option(
        False, "train on generated tokens (needs --vocab-size or --tokenizer-model)"
    )
    data_cache_path: str | None = option(
        None,
        "where sample indices are kept; default: a folder 'cache' beside the data",
        path="read",
    )
    tokenizer_type: str | None = option(
        None,
        "default: told by the file",
        choices=("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"),
    )
    tokenizer_model: str | None = option(
        None, "SentencePiece .model or Hugging Face tokenizer.json", path="read"
    )
    vocab_file: str | None = option(
        None, "GPT-2's vocab.json, with --merge-file; instead of tokenizer-model", path="read"
    )
    merge_file: str | None = option(None, "GPT-2's merges.txt, with --vocab-file", path="read")
    eod_token: str | None = option(
        None, "token that ends a document; default: as the files beside the tokenizer say"
    )
    bos_token: str | None = option(None, "token that begins a document; default: likewise")
    add_bos: bool | None = option(
        None, "documents and prompts begin with bos-token; default: as the tokenizer's files say"
    )
    parse_special: bool = option(
        False, "control tokens that are written in a text become those tokens"
    )
    calibration_samples: int = option(
        128,
        "with mask-metric wanda, in a run that starts from given weights: first samples of the "
        "training data whose inputs choose the first masks, in whole global batches; 0: none, the "
        "first masks are magnitude's",
        at_least=0,
    )
    verify_data: str = option(
        "auto",
        "bytes of the datasets that are compared with their checksums and with those of the "
        "checkpoint: all of files up to 1 GiB and samples of larger ones (auto), or all (full)",
        choices=("auto", "full"),
    )
    num_workers: int = option(0, "processes that load data, per rank", at_least=0)
    reset_position_ids: bool = option(False, "positions start again after an end of document")
    reset_attention_mask: bool = option(False, "no attention across documents")
    eod_mask_loss: bool = option(False, "no loss on end-of-document tokens")
    sft: bool = option(
        False,
        "supervised fine-tuning on conversations (tools/preprocess_data.py --sft): loss on the "
        "answers alone, several conversations in a sample, each sees itself only; masks stay "
        "(freeze-masks), and there is no dense tail unless it is asked for",
    )


@dataclass
class DistillationConfig:
    """A frozen dense teacher beside the student (AST); off while its weight is 0."""

    kd_loss_weight: float = option(
        0.0,
        "weight of KL(teacher || student) in the loss (AST: 0.67 for GPT-2); 0: no teacher",
        at_least=0.0,
    )
    lm_loss_weight: float = option(
        1.0, "weight of the cross entropy beside it (AST: 0.33 for GPT-2)", at_least=0.0
    )
    kd_temperature: float = option(
        2.0, "divides both logits; the divergence is multiplied by its square", above=0.0
    )
    teacher_load: str | None = option(
        None,
        "folder of the teacher's checkpoints; default: the weights that the run starts from",
        path="read",
    )
    teacher_dtype: str | None = option(
        None,
        "the teacher's precision; default: the student's. fp8: weights of its linears kept "
        "in e4m3, GEMMs in the student's precision",
        choices=("bf16", "fp32", "fp8"),
    )
