"""The typed run configuration: one dataclass a group, every field name unique across groups.

A field is at once a YAML key (`group: {field: value}`), a flag (`--field-with-dashes`, spelled as
in Megatron) and an attribute (`config.group.field`). The text in `option(...)` is the flag's help.
`choices` and bounds that concern one field alone live here; what ties fields together is in
`validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megasparse.config.option import option
from megasparse.config.schema_run import CheckpointConfig, LoggingConfig


@dataclass
class ModelConfig:
    """Size and style of the Transformer."""

    num_layers: int = option(4, "Transformer layers", at_least=1)
    hidden_size: int = option(256, "width of the residual stream", at_least=4)
    ffn_hidden_size: int | None = option(
        None, "width of the FFN; default 4 x hidden, with --swiglu 8/3 x hidden in multiples of 64",
        at_least=4,
    )  # fmt: skip
    num_attention_heads: int = option(4, "attention heads", at_least=1)
    group_query_attention: bool = option(False, "grouped-query attention; needs --num-query-groups")
    num_query_groups: int | None = option(None, "key/value heads; default: all heads", at_least=1)
    kv_channels: int | None = option(None, "size of a head; default hidden / heads", at_least=1)
    seq_length: int = option(256, "tokens in a sequence", at_least=2)
    max_position_embeddings: int | None = option(
        None, "longest sequence that positions exist for; default seq-length", at_least=2
    )
    position_embedding_type: str = option(
        "learned_absolute", "positions", choices=("learned_absolute", "rope")
    )
    rotary_base: int = option(10000, "base of the rotary frequencies", at_least=1)
    rotary_percent: float = option(1.0, "share of a head that rotates", above=0.0)
    use_rope_scaling: bool = option(False, "rotary frequencies scaled as in Llama 3.1 to 3.3")
    rope_scaling_factor: float = option(8.0, "factor of use-rope-scaling", above=0.0)
    normalization: str = option("LayerNorm", "norm layers", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "epsilon of the norm layers", above=0.0)
    swiglu: bool = option(False, "gated SiLU in the FFN instead of GELU")
    disable_bias_linear: bool = option(False, "no biases in the linear layers")
    untie_embeddings_and_output_weights: bool = option(
        False, "separate weights for embedding and output layer"
    )
    vocab_size: int | None = option(
        None, "tokens of the vocabulary before padding; default: the tokenizer's", at_least=1
    )
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this and of the tensor parallel size", at_least=1
    )
    hidden_dropout: float = option(0.0, "dropout on the residual branches", at_least=0.0, below=1.0)
    attention_dropout: float = option(0.0, "dropout on attention weights", at_least=0.0, below=1.0)
    init_method_std: float = option(0.02, "standard deviation of the initial weights", above=0.0)


@dataclass
class ParallelConfig:
    """How the model and its state are divided over ranks."""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer", at_least=1)
    pipeline_model_parallel_size: int = option(1, "pipeline stages", at_least=1)
    decoder_first_pipeline_num_layers: int | None = option(
        None, "layers of the first stage; default: as many as the others", at_least=1
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "layers of the last stage; default: as many as the others", at_least=1
    )
    sequence_parallel: bool = option(False, "split norms and residuals over the sequence (with TP)")
    zero_stage: int | None = option(
        None, "DeepSpeed ZeRO stage; default 0 in fp32, 1 in bf16", choices=(0, 1, 2, 3)
    )
    recompute_granularity: str | None = option(
        None, "what is computed again in the backward pass to save memory: whole layers (full) or "
        "attention without its linears (selective); default: nothing",
        choices=("full", "selective"),
    )  # fmt: skip
    recompute_method: str | None = option(
        None, "full: every chunk of recompute-num-layers keeps its input alone (uniform, the "
        "default), or only the first recompute-num-layers of a stage are recomputed (block)",
        choices=("uniform", "block"),
    )  # fmt: skip
    recompute_num_layers: int | None = option(
        None, "layers in a chunk, or to recompute (see recompute-method); default 1", at_least=1
    )
    replica_check_interval: int = option(
        100, "steps between comparisons of replicas over ranks; 0: never", at_least=0
    )
    distributed_timeout_minutes: float = option(
        10.0, "a collective that takes longer ends the run", above=0.0
    )
    hang_timeout: float = option(
        60.0, "seconds without progress after which a rank is taken to hang; 0: never", at_least=0.0
    )
    deepspeed_config: str | None = option(
        None, "JSON file with more of DeepSpeed's settings (buckets, profilers); it may not "
        "contradict the flags",
    )  # fmt: skip
    preflight: str = option(
        "fast", "what is checked of the hosts before the run is built: versions, data, memory, "
        "disk and clocks (fast), also GPUs and bandwidth (full)", choices=("off", "fast", "full"),
    )  # fmt: skip
    preflight_min_bandwidth: float = option(
        0.0, "GB/s of all-reduce below which a full preflight fails; 0: it only tells",
        at_least=0.0,
    )  # fmt: skip


@dataclass
class TrainConfig:
    """Batch, length, optimizer and precision."""

    micro_batch_size: int = option(1, "sequences a rank computes at once", at_least=1)
    global_batch_size: int | None = option(
        None, "sequences in an optimizer step; default micro-batch x data parallel", at_least=1
    )
    train_iters: int = option(100, "optimizer steps", at_least=1)
    lr: float = option(3e-4, "peak learning rate", above=0.0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", at_least=0.0)
    lr_decay_style: str = option(
        "cosine", "shape of the decay", choices=("constant", "linear", "cosine")
    )
    lr_decay_iters: int | None = option(None, "steps of the decay; default train-iters", at_least=1)
    lr_warmup_iters: int = option(0, "steps of linear warm-up", at_least=0)
    lr_warmup_fraction: float | None = option(
        None, "warm-up as a share of lr-decay-iters, instead of lr-warmup-iters",
        at_least=0.0, below=1.0,
    )  # fmt: skip
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
        None, "attention, norms and rotary embedding: Transformer Engine's or torch's (local); "
        "default: Transformer Engine's in bf16 on a GPU, where it is installed",
        choices=("local", "transformer_engine"),
    )  # fmt: skip
    exit_interval: int | None = option(
        None, "save and stop at the first step divisible by this", at_least=1
    )
    exit_duration_in_mins: float | None = option(
        None, "save and stop at the first step after this many minutes", above=0.0
    )
    max_skipped_steps: int = option(
        0, "steps in a row that may be skipped for a NaN or infinity before the run ends",
        at_least=0,
    )  # fmt: skip


@dataclass
class DataConfig:
    """Where tokens come from."""

    data_path: list[str] = option(
        [], "dataset prefixes, or pairs of weight and prefix: 0.7 a 0.3 b"
    )
    train_data_path: list[str] = option([], "like data-path, for training alone")
    valid_data_path: list[str] = option([], "like data-path, for validation alone")
    test_data_path: list[str] = option([], "like data-path, for testing alone")
    split: str = option("969,30,1", "shares of training, validation and test in data-path")
    mock_data: bool = option(False, "train on generated tokens (needs --vocab-size)")
    data_cache_path: str | None = option(
        None, "where sample indices are kept; default: a folder 'cache' beside the data"
    )
    tokenizer_type: str | None = option(
        None, "default: told by the file",
        choices=("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"),
    )  # fmt: skip
    tokenizer_model: str | None = option(
        None, "SentencePiece .model or Hugging Face tokenizer.json"
    )
    num_workers: int = option(0, "processes that load data, per rank", at_least=0)
    reset_position_ids: bool = option(False, "positions start again after an end of document")
    reset_attention_mask: bool = option(False, "no attention across documents")
    eod_mask_loss: bool = option(False, "no loss on end-of-document tokens")


@dataclass
class SparsityConfig:
    """Which layers are 2:4, by which recipe. Unset values are the recipe's own."""

    sparsity_recipe: str = option(
        "dense", "training method",
        choices=("dense", "ste", "sr_ste", "fst", "s_ste", "ast"),
    )  # fmt: skip
    sparse_layers: list[str] = option(
        ["*.mlp.linear_fc1", "*.mlp.linear_fc2"],
        "name patterns of the sparse linears, e.g. '*.self_attention.linear_*' for attention too",
    )
    mask_update_interval: int | None = option(None, "steps between mask refreshes", at_least=1)
    masked_decay: float | None = option(
        None, "decay of masked weights (lambda_W of FST, lambda of SR-STE, final value of AST)",
        at_least=0.0,
    )  # fmt: skip
    masked_decay_ramp_iters: int | None = option(
        None, "steps over which the decay grows from 0 (AST's T0)", at_least=0
    )
    masked_decay_before_clipping: bool = option(
        False, "clip gradient and decay together, instead of adding the decay to the clipped one"
    )
    mvue: str | None = option(
        None, "how output gradients are made 2:4 for the weight gradient",
        choices=("off", "exact", "approximate"),
    )  # fmt: skip
    dense_warmup_fraction: float | None = option(
        None, "share of the steps that is dense at the start", at_least=0.0, below=1.0
    )
    dense_tail_fraction: float | None = option(
        None, "share of the steps that is dense at the end (FST's paper: 1/6)",
        at_least=0.0, below=1.0,
    )  # fmt: skip
    s_ste_scale: str | None = option(
        None, "when S-STE's scale is computed: before the first sparse step, or anew in each; "
        "default frozen", choices=("frozen", "every_step"),
    )  # fmt: skip
    simulate_fp8: bool = option(
        False,
        "round operands of sparse layers to FP8 as S-STE's paper does (e4m3 forward, e5m2 "
        "backward); for its numerics, without speed",
    )
    mask_metric: str | None = option(
        None, "what row-wise masks keep the largest of: weights (magnitude), or weights times the "
        "norm of their input (wanda); default magnitude",
        choices=("magnitude", "wanda"),
    )  # fmt: skip
    slorb_k: int | None = option(
        None, "add SLoRB's low-rank branch to sparse layers, of rank inputs / k (AST: 16)",
        at_least=1,
    )  # fmt: skip
    slorb_train_projection: bool = option(
        True, "train SLoRB's projection too, instead of sums over groups of k inputs"
    )
    track_flip_rate: bool = option(
        True, "measure flip rates in dense phases too (masks are computed, not applied)"
    )


@dataclass
class Fp8Config:
    """FP8 GEMMs of the sparse layers (Hopper, with Transformer Engine)."""

    fp8_format: str | None = option(
        None, "compute the sparse layers' GEMMs in 8 bits: all operands e4m3 (e4m3), or output "
        "gradients in e5m2 where their GEMM is dense (hybrid); default: in the model's precision",
        choices=("e4m3", "hybrid"),
    )  # fmt: skip
    fp8_recipe: str = option(
        "delayed", "what a tensor is scaled by: the largest magnitudes of earlier steps (delayed), "
        "or its own, found in one more pass over it (tensorwise, current scaling)",
        choices=("delayed", "tensorwise"),
    )  # fmt: skip
    fp8_margin: int = option(
        0, "scales are divided by 2 to the power of this (delayed)", at_least=0
    )
    fp8_amax_history_len: int = option(
        16, "optimizer steps whose largest magnitudes make a scale (delayed)", at_least=1
    )
    fp8_amax_compute_algo: str = option(
        "max", "the largest of them, or the newest (delayed)", choices=("max", "most_recent")
    )


@dataclass
class DistillationConfig:
    """A frozen dense teacher beside the student (AST); off while its weight is 0."""

    kd_loss_weight: float = option(
        0.0, "weight of KL(teacher || student) in the loss (AST: 0.67 for GPT-2); 0: no teacher",
        at_least=0.0,
    )  # fmt: skip
    lm_loss_weight: float = option(
        1.0, "weight of the cross entropy beside it (AST: 0.33 for GPT-2)", at_least=0.0
    )
    kd_temperature: float = option(
        2.0, "divides both logits; the divergence is multiplied by its square", above=0.0
    )
    teacher_load: str | None = option(
        None, "folder of the teacher's checkpoints; default: the weights that the run starts from"
    )
    teacher_dtype: str | None = option(
        None, "the teacher's precision; default: the student's. fp8: weights of its linears kept "
        "in e4m3, GEMMs in the student's precision",
        choices=("bf16", "fp32", "fp8"),
    )  # fmt: skip


@dataclass
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
