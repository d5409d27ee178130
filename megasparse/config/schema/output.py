"""The groups of the configuration that say what a run leaves behind and what a person sees."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config.schema.option import option


@dataclass
class CheckpointConfig:
    """What a run leaves behind."""

    run_dir: str = option(
        "runs/default",
        "folder of everything that the run writes; default: save, or runs/NAMES",
        path="written",
    )
    save: str | None = option(
        None, "folder of checkpoints; default RUN_DIR/checkpoints", path="written"
    )
    load: str | None = option(
        None,
        "folder of checkpoints, or of a run, to continue from; an error when it holds none",
        path="read",
    )
    load_hf: str | None = option(
        None,
        "folder of a Hugging Face model (LLaMA, GPT-2) whose weights the run starts from",
        path="read",
    )
    finetune: bool = option(
        False, "take the weights of --load alone: step 0, a new optimizer, other data or recipe"
    )
    branch_from: str | None = option(
        None,
        "a checkpoint (step-NUMBER, or a run's newest) to go on from in another folder: same step, "
        "data order, optimizer and draws, with other phases of the recipe if they are given",
        path="read",
    )
    resume: bool = option(
        False, "continue from the newest checkpoint in --save, or start when there is none"
    )
    exit_on_missing_checkpoint: bool = option(
        False, "with --resume, or --load and --save of one folder: an error when it holds none"
    )
    save_interval: int | None = option(
        None, "steps between checkpoints; default: one at the end", at_least=1
    )
    keep_last: int = option(2, "newest checkpoints to keep; 0: all", at_least=0)
    save_retain_interval: int | None = option(
        None, "checkpoints of steps divisible by this stay too, beside the newest", at_least=1
    )
    async_save: bool = option(False, "write checkpoints in the background, from a copy on the host")
    max_failed_saves: int = option(
        0, "saves in a row that may fail (disk full) before the run ends", at_least=0
    )
    max_restarts: int = option(
        0, "start again from the last checkpoint, this often, when a rank dies or hangs", at_least=0
    )
    max_restarts_without_progress: int = option(
        3, "restarts in a row without a new checkpoint before giving up", at_least=1
    )
    override_batch: bool = option(False, "continue with another global batch size")
    override_seq_length: bool = option(False, "continue with another sequence length")
    override_seed: bool = option(False, "continue with another seed")
    override_data: bool = option(False, "continue with other data, or another split of it")
    override_tokenizer: bool = option(False, "continue with another tokenizer")
    override_schedule: bool = option(False, "continue with other steps, rates or optimizer values")
    override_precision: bool = option(False, "continue in another precision")
    override_model: bool = option(False, "continue with other model settings, where shapes allow")
    override_recipe: bool = option(
        False, "continue with another sparsity recipe: dense to sparse, sparse to dense, ..."
    )
    override_distillation: bool = option(
        False, "continue with other weights of the losses, temperature or teacher's precision"
    )
    override_rng: bool = option(False, "continue with new dropout draws in another layout")


@dataclass
class LoggingConfig:
    """What a person sees."""

    log_level: str = option(
        "info",
        "what rank 0 says on the screen; the others say warnings and errors",
        choices=("debug", "info", "warning", "error"),
    )
    log_interval: int = option(10, "steps between lines on the screen", at_least=1)
    eval_interval: int | None = option(
        None, "steps between validations; default: one at the end", at_least=1
    )
    eval_iters: int = option(10, "global batches in a validation; 0: none", at_least=0)
    tensorboard_dir: str | None = option(None, "default RUN_DIR/tensorboard", path="written")
    log_csv: bool = option(False, "write RUN_DIR/metrics.csv too")
    log_layers: bool = option(False, "write RUN_DIR/layers.jsonl: every layer's figures")
    wandb_project: str | None = option(None, "Weights & Biases: project; default: not used")
    wandb_exp_name: str | None = option(None, "its name of the run; default: the run folder's")
    wandb_save_dir: str | None = option(
        None, "its local folder; default RUN_DIR/wandb", path="written"
    )
    wandb_entity: str | None = option(None, "its team or user")
    mlflow_experiment: str | None = option(None, "MLflow: experiment; default: not used")
    mlflow_run_name: str | None = option(None, "its name of the run; default: the run folder's")
    mlflow_tracking_uri: str | None = option(
        None, "its server or folder; default: file:RUN_DIR/mlflow"
    )
    profile: bool = option(
        False,
        "profile the steps after profile-step-start up to profile-step-end: a trace by torch in "
        "RUN_DIR/profile, or ranges for nsys where it runs",
    )
    profile_step_start: int = option(10, "steps done when the profile starts", at_least=0)
    profile_step_end: int = option(12, "steps done when it ends", at_least=1)
    profile_ranks: list[str] = option(["0"], "ranks that are profiled")
    profile_eager: bool = option(
        True, "run layers without CUDA graphs in these steps, so that their GEMMs have names"
    )
    use_pytorch_profiler: bool = option(False, "torch's profiler also where nsys runs")
    record_memory_history: bool = option(
        False, "keep the history of GPU memory of the profiled ranks, until profile-step-end"
    )
    memory_snapshot_path: str | None = option(
        None, "where; default RUN_DIR/profile/memory.rankN.pickle", path="written"
    )
    peak_tflops: float | None = option(
        None,
        "dense peak of a GPU (or CPU) for MFU; default: known GPUs' in the precision in use",
        above=0.0,
    )
    sample_prompt: list[str] = option(
        [""], "texts that samples continue; an empty one: the model begins", empty=True
    )
    sample_tokens: int | None = option(
        None, "length of a sample; 0: none; default: 64 with sample-interval, else 0", at_least=0
    )
    sample_interval: int | None = option(
        None, "steps between samples; default: one at the end", at_least=1
    )
    eval_harness_tasks: list[str] = option(
        [], "tasks of lm-evaluation-harness that the model is evaluated on; needs lm-eval"
    )
    eval_harness_interval: int | None = option(
        None, "steps between these evaluations; default: one at the end", at_least=1
    )
    eval_harness_num_fewshot: int | None = option(
        None, "examples before each question; default: what the task says", at_least=0
    )
    eval_harness_limit: int | None = option(
        None, "questions of each task; default: all", at_least=1
    )
    eval_harness_include_path: str | None = option(
        None, "folder of more tasks, in lm-eval's YAML", path="read"
    )
