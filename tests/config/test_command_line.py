"""Command lines of Megatron-LM and Megatron-DeepSpeed: taken, translated, or told what is wrong."""

from __future__ import annotations

import json

import pytest

from megasparse.config import command_line, load_config, resolve
from megasparse.config.command_line import CommandLine
from megasparse.config.fields import FIELDS
from megasparse.config.flags.missing import FAMILIES
from megasparse.config.flags.table import OURS_ALONE, Row, rows
from megasparse.errors import ConfigError
from tests.config.published import PUBLISHED

# Fields that are flags of Megatron-LM's (core 0.16.1) or Megatron-DeepSpeed's parser.
THEIRS = """
    context_parallel_size cp_comm_type
    num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention
    num_query_groups kv_channels seq_length max_position_embeddings position_embedding_type
    rotary_base rotary_percent use_rope_scaling rope_scaling_factor normalization norm_epsilon
    swiglu squared_relu disable_bias_linear untie_embeddings_and_output_weights vocab_size
    make_vocab_size_divisible_by hidden_dropout attention_dropout init_method_std
    tensor_model_parallel_size pipeline_model_parallel_size decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers sequence_parallel zero_stage
    accumulate_allreduce_grads_in_fp32 recompute_granularity recompute_method
    recompute_num_layers distributed_timeout_minutes deepspeed_config micro_batch_size
    global_batch_size rampup_batch_size train_iters train_samples lr min_lr decoupled_lr
    decoupled_min_lr lr_decay_style lr_decay_iters lr_wsd_decay_style lr_wsd_decay_iters
    lr_warmup_iters lr_decay_samples lr_wsd_decay_samples lr_warmup_samples lr_warmup_fraction
    weight_decay adam_beta1 adam_beta2 adam_eps clip_grad seed bf16 deterministic_mode
    cuda_graph_impl transformer_impl exit_interval exit_duration_in_mins data_path
    train_data_path valid_data_path test_data_path split mock_data data_cache_path
    tokenizer_type tokenizer_model vocab_file merge_file num_workers reset_position_ids
    window_size window_attn_skip_freq no_rope_freq add_qkv_bias qk_layernorm
    reset_attention_mask eod_mask_loss sft fp8_format fp8_recipe fp8_margin fp8_amax_history_len
    fp8_amax_compute_algo save load finetune exit_on_missing_checkpoint save_interval
    save_retain_interval async_save log_interval eval_interval eval_iters tensorboard_dir
    wandb_project wandb_exp_name wandb_save_dir wandb_entity
    mask_prob short_seq_prob
    multiple_validation_sets profile profile_step_start profile_step_end profile_ranks
    use_pytorch_profiler
    record_memory_history memory_snapshot_path
    num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax
    moe_router_dtype moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_token_dispatcher_type
    moe_grouped_gemm expert_model_parallel_size expert_tensor_parallel_size
"""
ALL = [row for found in rows().values() for row in found]


def test_a_flag_has_one_meaning():
    """No flag of ours is in the table, and no flag has two rows for the same value."""
    own = {info.flag for info in FIELDS.values()} | {"--deepspeed_config", "--config"}
    assert not own & rows().keys()
    for flag, found in rows().items():
        general = [row for row in found if not row.only]
        values = [value for row in found for value in row.only]
        assert len(general) <= 1 and len(set(values)) == len(values), flag
        assert not general or found[-1] is general[0], f"{flag}: a row that is never asked"
    assert len(rows()) >= 650


def _words(row: Row) -> list[str]:
    values = {"0": [], "1": ["7"], "*": ["7", "8"]}[row.takes]
    return [row.flag, *(row.only[:1] or values)]


def test_a_field_is_megatrons_or_ours_alone():
    """A new field is named in `OURS_ALONE` of flags/table.py, or above."""
    theirs = set(THEIRS.split())
    assert not theirs & OURS_ALONE and theirs | OURS_ALONE == FIELDS.keys()


def test_every_row_does_what_it_says():
    for row in ALL:
        line = command_line.read(_words(row))
        if row.missing:
            (problem,) = line.problems
            assert problem.endswith(f"is not supported: {row.says}") and row.flag in problem
        elif row.becomes is None:
            assert line == CommandLine(nothing_to_do=[row.flag]), row
        else:
            assert line.values and not line.problems and not line.nothing_to_do, row
            (told,) = line.translated
            assert row.flag in told and row.says in told
        spare = command_line.read([*_words(row), "more"])
        assert spare.problems or row.takes == "*", row


def test_newer_flags_of_a_family_are_told_what_there_is_instead():
    own = {info.flag for info in FIELDS.values()}
    for start, says in FAMILIES:
        assert not [flag for flag in own if flag.startswith(start)], start
        (problem,) = command_line.read([f"{start}of-tomorrow", "1", "2"]).problems
        assert problem == f"{start}of-tomorrow 1 2 is not supported: {says}"


def test_translations_are_flags_that_load():
    """With values that fit, every translated command line is a configuration."""
    for row in ALL:
        if row.becomes is not None:
            words = [row.flag, *(row.only[:1] or (["3"] if row.takes == "1" else []))]
            config = load_config(words)
            expected = load_config(row.becomes.format(*words[1:]).split())
            assert config == expected, row
            is_default = row.becomes in ("--cuda-graph-impl local", "--log-level info")
            assert config != load_config([]) or is_default, row


def test_a_flag_of_ours_wins_over_a_translated_one_in_any_order():
    for argv in (["--fp16", "--no-bf16"], ["--no-bf16", "--fp16"]):
        assert not load_config(argv).train.bf16
    assert (
        load_config(["--zero-stage", "2", "--use-distributed-optimizer"]).parallel.zero_stage == 2
    )


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layer: 3, hidden_size: wide}\nlr: 1\n")
    argv = ["stray", "--config", str(path), "--use-distributed-optimiser", "--lr", "-1"]
    argv += ["--moe-latent-size", "8", "--swiglu", "yes", "--micro-batch-size", "1", "2", "--seed"]
    argv += ["--optimizer", "sgd", "--log-throughput", "3"]
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    told = caught.value.problems
    for words in (
        "unexpected argument 'stray'",
        "unknown key model.num_layer, did you mean num_layers?",
        "model.hidden_size: found 'wide'",
        "unknown group 'lr'",
        "unknown flag --use-distributed-optimiser, did you mean --use-distributed-optimizer?",
        "--lr: found '-1'",
        "--moe-latent-size 8 is not supported: experts are megatron-core's, dropless",
        "unexpected argument 'yes' after --swiglu, which has no value",
        "unexpected argument '2' after --micro-batch-size 1",
        "--seed: found no value",
        "--optimizer sgd is not supported: the optimizer is AdamW",
        "unexpected argument '3' after --log-throughput",
    ):
        assert sum(words in problem for problem in told) == 1, (words, told)
    assert len(told) == 12 and all("\n" not in problem for problem in told)


def test_all_that_does_not_fit_is_told_at_once():
    argv = ["--mock-data", "--vocab-size", "128", "--num-attention-heads", "3", "--lr", "1e-4"]
    argv += ["--min-lr", "1", "--num-layers", "3", "--pipeline-model-parallel-size", "2"]
    with pytest.raises(ConfigError) as caught:
        resolve(load_config([*argv, "--fp8-format", "e4m3", "--global-batch-size", "3"]), 4)
    told = caught.value.problems
    for words in ("num_attention_heads 3", "min_lr 1.0", "num_layers 3", "fp8_format", "size 3 is"):
        assert any(words in problem for problem in told), (words, told)
    assert len(told) == len(set(told)) == 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command_lines_are_runs(name, tmp_path):
    """Whole, at their own sizes and on as many GPUs as they want; only files are not there."""
    script = PUBLISHED[name]
    (tmp_path / "ds.json").write_text(json.dumps(script.json or {}))
    config = resolve(load_config(script.argv(tmp_path)), script.world)
    assert config.model.num_layers == script.layers
    line = command_line.read(script.argv(tmp_path, whole=True))
    refused = {told.split()[0] for told in line.problems}
    assert refused == set(script.missing)
    taken = set(line.nothing_to_do) | {told.split()[0] for told in line.translated}
    foreign = {word.split("=")[0] for word in script.words} & rows().keys()
    assert taken == foreign - refused
