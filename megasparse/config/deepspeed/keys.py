"""DeepSpeed's JSON as a table: which key is which flag, which goes to DeepSpeed, which is missing.

A key of a section is written `section.key`; `section.*` stands for all that it may hold.
"""

from __future__ import annotations

# Keys that are settings of the run: the field that has the value.
FIELDS_OF = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_clipping": "clip_grad",
    "zero_optimization.stage": "zero_stage",
    "bf16.enabled": "bf16",
    "fp16.enabled": "bf16",
    "optimizer.params.lr": "lr",
    "optimizer.params.eps": "adam_eps",
    "optimizer.params.weight_decay": "weight_decay",
}

# Keys that say what `megasparse.config.deepspeed.json_file` reads in a way of its own.
READ = (
    "gradient_accumulation_steps optimizer.type optimizer.params.betas "
    "optimizer.params.adam_w_mode scheduler.type scheduler.params.* data_types.grad_accum_dtype "
    "activation_checkpointing.number_checkpoints activation_checkpointing.partition_activations "
    "activation_checkpointing.contiguous_memory_optimization"
)

# Keys that go to DeepSpeed as they are.
PASSED_ON = (
    "steps_per_print wall_clock_breakdown memory_breakdown dump_state prescale_gradients "
    "gradient_predivide_factor gradient_allreduce_op communication_data_type log_level "
    "disable_python_gc flops_profiler.* comms_logger.* comms_config.* tensorboard.* wandb.* "
    "csv_monitor.* comet.* timers.* aio.* zero_optimization.reduce_bucket_size "
    "zero_optimization.allgather_bucket_size zero_optimization.allgather_partitions "
    "zero_optimization.reduce_scatter zero_optimization.contiguous_gradients "
    "zero_optimization.round_robin_gradients zero_optimization.use_multi_rank_bucket_allreduce "
    "zero_optimization.sub_group_size zero_optimization.ignore_unused_parameters "
    "zero_optimization.legacy_stage1 zero_optimization.log_trace_cache_warnings "
    "zero_optimization.enable_sanity_checks zero_optimization.memory_efficient_linear "
    "zero_optimization.stage3_prefetch_bucket_size "
    "zero_optimization.stage3_param_persistence_threshold "
    "zero_optimization.stage3_model_persistence_threshold "
    "zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance "
    "zero_optimization.stage3_module_granularity_threshold "
    "zero_optimization.stage3_use_all_reduce_for_fetch_params "
    "zero_optimization.stage3_allgather_sequential"
)

# Why a key changes nothing here.
NOTHING = {
    "BF16 needs no loss scale": (
        "fp16.auto_cast fp16.loss_scale fp16.initial_scale_power fp16.loss_scale_window "
        "fp16.hysteresis fp16.consecutive_hysteresis fp16.min_loss_scale bf16.loss_scale "
        "bf16.initial_scale_power bf16.loss_scale_window bf16.hysteresis bf16.min_loss_scale "
        "bf16.check_grad_overflow bf16.immediate_grad_update bf16.auto_cast"
    ),
    "gradients are reduced after the last micro-batch of a step, in one piece": (
        "zero_optimization.overlap_comm"
    ),
    "activations are recomputed as --recompute-granularity says": (
        "activation_checkpointing.synchronize_checkpoint_boundary activation_checkpointing.profile"
    ),
    "the optimizer is megasparse's own AdamW": (
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer optimizer.legacy_fusion "
        "optimizer.params.torch_adam optimizer.params.bias_correction optimizer.params.fused"
    ),
    "checkpoints have a format of their own": (
        "checkpoint.* load_universal_checkpoint zero_optimization.elastic_checkpoint "
        "zero_optimization.load_from_fp32_weights "
        "zero_optimization.stage3_gather_16bit_weights_on_model_save "
        "zero_optimization.stage3_gather_fp16_weights_on_model_save "
        "zero_optimization.pipeline_loading_checkpoint"
    ),
    "data are not loaded by DeepSpeed": ("dataloader_drop_last"),
}

# Why a key is not here, and what there is instead; `{"enabled": false}` and false pass.
MISSING = {
    "offload of optimizer state or parameters: masked decay reads masks, weights and gradients "
    "on one device in every step; use --zero-stage and --recompute-granularity": (
        "zero_optimization.offload_optimizer.* zero_optimization.offload_param.* "
        "zero_optimization.cpu_offload zero_optimization.cpu_offload_param "
        "zero_optimization.cpu_offload_use_pin_memory zero_optimization.zenflow.* "
        "activation_checkpointing.cpu_checkpointing"
    ),
    "ZeRO++ and its quantised communication": (
        "zero_optimization.zero_hpz_partition_size zero_optimization.zero_quantized_weights "
        "zero_optimization.zero_quantized_gradients "
        "zero_optimization.zero_quantized_nontrainable_weights"
    ),
    "masters and moments are float32 here": (
        "fp16.fp16_master_weights_and_grads bf16.bf16_master_weights_and_grads "
        "bf16.bf16_optimizer_states"
    ),
    "the precision is --bf16 or float32": ("amp.* torch_autocast.*"),
    "the order of samples is a function of --seed": ("curriculum_learning.* data_efficiency.*"),
    "layers become sparse by --sparsity-recipe": (
        "compression_training.* sparse_attention.* weight_quantization.* progressive_layer_drop.* "
        "eigenvalue.*"
    ),
    "the layout is --tensor-model-parallel-size, --pipeline-model-parallel-size": (
        "tensor_parallel.* expert_parallel.* pipeline.* sequence_parallel_size "
        "use_data_before_expert_parallelism"
    ),
    "restarts are --max-restarts": ("elasticity.* nebula.* datastates.*"),
    "training here needs none of it": ("autotuning.* hybrid_engine.* compile.* zero_infinity.*"),
}
