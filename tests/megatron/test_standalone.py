"""The spec provider alone: megatron-core's model, schedules, DDP, optimizer and checkpoints."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests import dist

SEQUENCE, VOCABULARY = 16, 64
# Masks change and decay within a few steps.
SETTINGS: dict[str, dict] = {
    "fst": {"masked_decay": 1e-2, "mask_update_interval": 2},
    "s_ste": {},
    "ast": {"masked_decay": 1e-2, "masked_decay_ramp_iters": 0, "mask_update_interval": 2},
}


def _built(tp: int, recipe: str, distributed: bool = False, gated: bool = True, bf16: bool = False):
    """Model, sparsity and optimizer; all of megatron-core but for the provider."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.spec import SparseSpecProvider, get_block_spec
    from megasparse.megatron.standalone import sparsify_model

    make_grid(tp, torch.device("cpu"), seed=7)
    torch.manual_seed(7)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        tensor_model_parallel_size=tp,
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        use_te_activation_func=gated,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    model = GPTModel(
        config,
        get_block_spec(SparseSpecProvider(), config.num_layers),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    sparsity = sparsify_model(model, recipe, seed=5, **SETTINGS[recipe])
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    ddp = DistributedDataParallel(config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=3e-3,
            clip_grad=1.0,
            bf16=bf16,
            use_distributed_optimizer=distributed,
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    return ddp, sparsity, optimizer


def _step(ddp, optimizer, number: int, micro_batches: int = 2, first: int = 0) -> float:
    """One step of megatron-core's loop: schedule, finalized gradients, optimizer."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    ddp.module.config.finalize_model_grads_func = finalize_model_grads

    def batches():
        for n in range(first, first + micro_batches):
            generator = torch.Generator().manual_seed(100 * number + n)
            yield torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=generator)

    def forward(data, model):
        tokens = next(data)
        positions = torch.arange(SEQUENCE)[None].expand(2, -1)
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, :-1] * 3 % VOCABULARY)
        return loss, lambda output: (output.mean(), {"loss": output.detach().mean()})

    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=batches(),
        model=[ddp],
        num_microbatches=micro_batches,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=False,
    )
    success, _, _ = optimizer.step()
    assert success
    return float(sum(one["loss"] for one in losses) / len(losses))


def _whole(sparsity) -> dict:
    """Masks and scales of this rank, with the places of their shards."""
    weights = sparsity.controller.weights
    return {
        state.name: (
            state.shard,
            None if state.mask is None else state.mask.clone(),
            None if state.scale is None else state.scale.item(),
            (state.last_refresh, state.refreshes),
        )
        for state, _ in weights
    }


def _trained(rank, world, recipe, folder, steps, save_at=None, load=False, distributed=False):
    import multiprocessing

    from megatron.core import dist_checkpointing

    from tests.megatron.on_cpu import OnCpu

    # Its writer starts a process, which a test's rank, a daemon, may not.
    multiprocessing.current_process()._config["daemon"] = False
    torch.cuda.synchronize = lambda *_: None
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [child.kill() for child in multiprocessing.active_children()])
        stack.enter_context(OnCpu())
        ddp, sparsity, optimizer = _built(world, recipe, distributed)
        if distributed:
            sparsity.attach(optimizer)
        assert all(torch.isfinite(p).all() for p in ddp.parameters())
        if load:
            model_state = ddp.module.sharded_state_dict()
            sharded = {"model": model_state}
            sharded["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=True)
            loaded = dist_checkpointing.load(sharded, folder)
            ddp.module.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])
            assert sparsity.controller.steps_done == steps.start
        before, losses = _whole(sparsity), []
        for number in steps:
            losses.append(_step(ddp, optimizer, number))
            if number + 1 == save_at:
                model_state = ddp.module.sharded_state_dict()
                sharded = {"model": model_state}
                sharded["optimizer"] = optimizer.sharded_state_dict(model_state)
                dist_checkpointing.save(sharded, folder)
                before = _whole(sparsity)
        return losses, before, _whole(sparsity), sorted(ddp.module.state_dict())


def _assembled(ranks, position, name):
    shards = [rank[position][name] for rank in ranks]
    whole = torch.zeros(shards[0][0].global_shape, dtype=torch.bool)
    for shard, mask, _, _ in shards:
        shard.write_into(whole, mask)
    return whole


@pytest.mark.parametrize("recipe", SETTINGS)
def test_megatrons_loop_trains_saves_and_goes_on_with_another_tp(recipe, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    one = dist.run(_trained, 1, recipe, str(folder), range(5), 3)
    (losses, saved, ended, names) = one[0]
    assert losses[-1] < losses[0]
    assert sum("sparsity_mask" in name for name in names) == 4
    two = dist.run(_trained, 2, recipe, str(folder), range(3, 5), None, True)
    for name in saved:
        mask = saved[name][1]
        assert torch.equal(_assembled(two, 1, name), mask), name
        assert torch.equal(_assembled(two, 2, name), ended[name][1]), name
        for rank in two:
            assert rank[1][name][2:] == saved[name][2:]  # the scale to the last bit, counters
    for rank in two:
        torch.testing.assert_close(rank[0], losses[3:], rtol=1e-4, atol=1e-5)
    if recipe != "s_ste":
        decayed = next(iter(ended.values()))
        assert decayed[3][1] == 3  # refreshed at steps 0, 2 and 4


def _initialized(rank, world, stride):
    from types import SimpleNamespace

    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.parallel_linear import (
        SparseColumnParallelLinear,
        SparseRowParallelLinear,
    )

    grid = make_grid(world, torch.device("cpu"), seed=7)
    config = SimpleNamespace(
        sequence_parallel=False,
        use_cpu_initialization=True,
        perform_initialization=True,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        expert_model_parallel_size=1,
        symmetric_ar_type=None,
        defer_embedding_wgrad_compute=False,
        cpu_offloading=False,
        cpu_offloading_num_layers=0,
    )
    del grid
    made = []
    options = {"config": config, "init_method": lambda w: torch.nn.init.normal_(w, 0.0, 0.3)}
    for ours, theirs, more in (
        (SparseColumnParallelLinear, ColumnParallelLinear, {"stride": stride}),
        (SparseRowParallelLinear, RowParallelLinear, {"stride": 1}),
    ):
        weights = []
        for kind in (ours, theirs):
            torch.manual_seed(3)
            given = dict(more, bias=True, skip_bias_add=False)
            if kind is RowParallelLinear:
                given["input_is_parallel"] = True
            weights.append(kind(16, 32, **options, **given).weight)
        made.append(torch.equal(*weights) and 0.2 < float(weights[0].detach().std()) < 0.4)
    return made


@pytest.mark.parametrize("stride", [1, 2])
def test_linears_begin_with_the_numbers_of_megatrons_own(stride):
    assert dist.run(_initialized, 2, stride) == [[True, True], [True, True]]


def _distributed(rank, world, bf16, distributed):
    """Steps of the global micro-batches 0 and 1 of each step; the refusal, where there is one."""
    from megasparse.errors import ConfigError
    from tests.megatron.on_cpu import OnCpu

    with OnCpu():
        ddp, sparsity, optimizer = _built(1, "fst", distributed, bf16=bf16)
        message = None
        try:
            _step(ddp, optimizer, 0, 2 // world, rank)
        except ConfigError as error:
            message = str(error)
            sparsity.attach(optimizer)
            _step(ddp, optimizer, 0, 2 // world, rank)
        losses = [_step(ddp, optimizer, number, 2 // world, rank) for number in range(1, 4)]
        return message, losses, _whole(sparsity)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_distributed_optimizer_decays_its_pieces(bf16):
    first, second = dist.run(_distributed, 2, bf16, True)
    refused = "expected sparsity.attach(optimizer) before its first step"
    for message, _, _ in (first, second):
        assert refused in message if bf16 else message is None
    if bf16:  # the refused step was no step, but its draws were drawn
        assert all(0 < loss < 10 for loss in first[1])
        return
    (one,) = dist.run(_distributed, 1, False, False)
    mean = [(a + b) / 2 for a, b in zip(first[1], second[1])]
    torch.testing.assert_close(mean, one[1], rtol=1e-5, atol=1e-6)
    for name, (_, mask, _, counts) in one[2].items():
        assert torch.equal(first[2][name][1], mask) and first[2][name][3] == counts, name
