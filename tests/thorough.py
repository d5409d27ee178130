"""Tests that `make test` leaves out and `make test-all` runs, as CI does.

`make test` stays under ten minutes on two cores. What is here asks the same of further layouts,
families and combinations, or takes a long run of its own. Kernels are quick where there is a GPU:
there `make test` runs all of their cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

TESTS = Path(__file__).parent

# Of these `make test` runs the first case alone.
FIRST_CASE: dict[str, tuple[str, ...]] = {
    "checkpoint/test_compatibility.py": (
        "test_a_resume_is_exact_at_any_step",
        "test_another_layout_goes_on_with_equal_samples_and_losses",
        "test_dense_to_sparse_gives_two_of_four_everywhere",
    ),
    "convert/test_families.py": ("test_logits_are_those_of_transformers",),
    "convert/test_huggingface.py": (
        "test_logits_are_those_of_transformers_and_the_round_trip_is_exact",
    ),
    "convert/test_megatron.py": ("test_megatron_deepspeed",),
    "distillation/test_runs.py": ("test_layout_gives_the_numbers_of_one_process",),
    "distillation/test_wanda_runs.py": ("test_a_resume_remembers_the_inputs",),
    "distributed/test_hosts.py": ("test_a_killed_rank_is_named_on_all_hosts",),
    "distributed/test_launchers.py": ("test_a_launcher_without_a_parent_may_have_been_started_so",),
    "estimate/test_memory.py": ("test_every_parameter_and_every_byte_of_the_state",),
    "kernels/test_activation_amax.py": ("test_what_products_lack_is_given_to_them",),
    "kernels/test_activation_grad_pack24.py": ("test_backward_is_the_two_steps",),
    "kernels/test_expert_operands.py": ("test_each_is_what_packing_it_alone_gives",),
    "kernels/test_grad_pack24.py": ("test_equals_the_operations_it_fuses",),
    "kernels/test_mask_update.py": ("test_the_old_mask_is_kept_and_flips_are_counted",),
    "kernels/test_mvue24.py": ("test_triton_equals_the_reference",),
    "kernels/test_mvue24_squares.py": ("test_squares_are_those_of_the_formulas",),
    "kernels/test_pack24.py": ("test_the_layout_is_the_published_one",),
    "kernels/test_transposable24.py": ("test_backends_agree_bit_for_bit",),
    "kernels/test_weight_pack24.py": (
        "test_double_pruned",
        "test_operands_of_an_earlier_step_are_filled_in_place",
        "test_with_a_mask",
        "test_with_the_soft_threshold",
    ),
    "megatron/test_mlp.py": ("test_the_same_bits",),
    "megatron/test_norms.py": ("test_the_same_bits",),
    "megatron/test_parallel_linear.py": ("test_two_ranks_equal_one",),
    "megatron/test_standalone.py": (
        "test_megatrons_loop_trains_saves_and_goes_on_with_another_tp",
    ),
    "nn/test_wrappers.py": ("test_two_ranks_are_one",),
    "optim/test_decay_rule.py": ("test_layouts_follow_alike",),
    "parallel/test_consistency.py": ("test_a_flipped_bit_is_found_within_the_interval",),
    "parallel/test_details.py": (
        "test_bf16_follows_one_process",
        "test_context_parallel_equals_one_process",
        "test_no_rank_updates_on_an_infinite_gradient",
        "test_pipeline_equals_one_process",
        "test_replicated_gradients_are_whole_without_clipping_too",
        "test_the_ends_of_documents_are_in_the_data",
    ),
    "parallel/test_experts.py": ("test_every_layout_continues_the_run_of_one_process",),
    "reliability/test_bad_inputs.py": ("test_the_launcher_prints_it_on_every_rank",),
    "reliability/test_faults.py": ("test_every_signal_counts_also_twice",),
    "tools/test_compress_tools.py": ("test_quantized_ast_with_slorb",),
    "tools/test_data_tools.py": ("test_terminated_run_leaves_nothing",),
    "train/engine/test_gradients.py": ("test_sums_are_those_of_float64",),
    "train/engine/test_skipped_steps.py": ("test_a_skipped_step_leaves_nothing",),
    "train/engine/test_step_guard.py": (
        "test_a_bad_step_changes_nothing",
        "test_a_pipeline_names_stage_micro_batch_and_samples",
        "test_the_tensor_of_a_bad_gradient_is_named",
    ),
    "train/test_activations.py": (
        "test_it_trains_sparse_and_no_export_mistakes_it",
        "test_the_ffn_computes_its_formula",
    ),
    "train/test_batches.py": ("test_in_every_layout",),
    "train/test_fine_tuning.py": ("test_layouts_and_micro_batches_give_the_same_losses",),
    "train/test_initial_weights.py": ("test_a_frozen_scale_stays_frozen_in_a_finetuning",),
    "train/test_phases.py": ("test_dense_phases_are_dense_training_monitored_or_not",),
    "train/test_runs.py": (
        "test_loss_falls_and_the_checkpoint_is_what_the_recipe_promises",
        "test_resume_repeats_the_run_bit_for_bit",
    ),
}

# Of these it runs the cases named here; the matrix' richest layouts.
CASES: dict[str, tuple[str, ...]] = {
    "parallel/test_matrix.py": (
        "gpt fst: recompute full",
        "gpt fst: tp 2, sp, selective",
        "gpt fst: pp 2, uneven, zero 1",
        "gpt fst: dp 2, zero 3",
        "gpt fst: cp 2",
        "gpt fst: tp 2, sp, pp 2, zero 1, full",
        "gpt fst: tp 2, sp, dp 2, zero 3, full",
        "llama s_ste: tp 2",
        "llama fst, attention too: tp 2, sp, pp 2, zero 1, full",
    ),
}

# Of these it runs none; "*": of the whole file.
WHOLE: dict[str, tuple[str, ...]] = {
    "checkpoint/test_compatibility.py": ("test_each_change_is_refused_and_has_its_flag",),
    "convert/test_huggingface.py": ("test_training_starts_from_a_converted_model",),
    "convert/test_torch_dist.py": ("test_a_checkpoint_of_two_tensor_parallel_ranks",),
    "distillation/test_cast_runs.py": (
        "test_another_layout_continues_the_run",
        "test_layout_gives_the_numbers_of_one_process",
    ),
    "distillation/test_from_hugging_face.py": ("test_ast_from_a_qwen3_of_hugging_face",),
    "distillation/test_runs.py": (
        "test_resume_finds_the_teacher_again",
        "test_the_student_learns_from_its_teacher",
    ),
    "distillation/test_slorb_runs.py": (
        "test_another_layout_continues_the_run",
        "test_layout_gives_the_numbers_of_one_process",
    ),
    "distillation/test_wanda_runs.py": (
        "test_layout_gives_the_masks_of_one_process",
        "test_the_first_masks_know_the_inputs_of_the_given_weights",
    ),
    "distributed/test_supervise.py": ("test_a_second_start_leaves_a_supervised_run_alone",),
    "inference/test_eval_harness.py": (
        "test_a_run_with_tasks_and_samples_is_the_run_without_in_every_layout",
    ),
    "launch/test_inference.py": (
        "test_a_seed_draws_the_same_text_on_one_rank_and_two",
        "test_greedy_text_is_that_of_transformers_for_every_layout_and_source",
        "test_perplexity_is_that_of_transformers",
    ),
    "launch/test_slurm.py": ("*",),
    "megatron/graphs/test_layer_graphs.py": ("test_a_replayed_run_is_the_eager_one",),
    "megatron/test_import_without_compile.py": (
        "test_a_run_starts_without_the_compiler",
        "test_no_run_calls_what_would_have_been_compiled",
    ),
    "nn/test_sparsify.py": ("test_it_needs_torch_alone",),
    "parallel/test_details.py": (
        "test_logits_do_not_depend_on_the_layout",
        "test_recomputation_repeats_dropout_and_mvue",
        "test_sample_and_report_of_a_pipeline",
    ),
    "parallel/test_experts.py": ("test_fp8_is_the_same_over_expert_parallel_ranks",),
    "parallel/test_families.py": ("*",),
    "parallel/test_fp8.py": ("*",),
    "parallel/test_resume.py": ("test_another_layout_continues_the_run",),
    "parallel/test_ties.py": (
        "test_dense_layouts_differ_by_rounding",
        "test_masks_are_equal_until_a_rounding_difference_meets_a_tie",
    ),
    "reliability/test_faults.py": (
        "test_a_hang_of_one_rank_alone_is_found_in_every_phase",
        "test_a_killed_rank_is_named_and_the_other_ends",
        "test_a_stopped_rank_is_named",
        "test_runs_that_are_suspended_go_on",
        "test_two_runs_cannot_write_one_folder",
    ),
    "tools/bench/test_kernels.py": ("test_all_kernels_agree_at_their_odd_shapes",),
    "tools/bench/test_ranks.py": ("*",),
    "tools/bench/test_scaling.py": ("test_it_runs_on_cpu",),
    "train/engine/test_step_guard.py": (
        "test_rank_micro_batch_and_samples_of_a_bad_loss_are_named",
    ),
    "tools/experiments/test_compare_ast.py": ("*",),
    "tools/experiments/test_compare_recipes.py": ("*",),
    "tools/test_compress_tools.py": (
        "test_one_shot_methods_prune_and_their_checkpoints_start_runs",
    ),
    "tools/test_search_decay.py": (
        "test_a_search_runs_and_goes_on_where_it_stopped",
        "test_several_ranks_and_foreign_folders",
    ),
    "train/test_published.py": ("test_others_start",),
    "train/test_recorder.py": ("test_density_is_that_of_the_phase_and_a_resume_tells_the_same",),
}


class Item(Protocol):
    """What is asked of a `pytest.Item`."""

    path: Path
    name: str


def thorough(items: Iterable[Item], has_gpu: bool = False) -> Iterator[Item]:
    """Those of the collected tests that are left to `make test-all`."""
    begun: set[tuple[str, str]] = set()
    for item in items:
        file = str(item.path.relative_to(TESTS)) if item.path.is_relative_to(TESTS) else ""
        if has_gpu and file.startswith("kernels/"):
            continue
        function, _, case = item.name.partition("[")
        first = (file, function) not in begun
        begun.add((file, function))
        further = function in FIRST_CASE.get(file, ()) and not first
        unnamed = case and file in CASES and case.removesuffix("]") not in CASES[file]
        if further or unnamed or {function, "*"} & set(WHOLE.get(file, ())):
            yield item
