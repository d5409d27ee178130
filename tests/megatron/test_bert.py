"""BERT: its loss and gradients against plain torch, on one rank and on two."""

from __future__ import annotations

import torch
from torch.nn import functional

from tests import dist
from tests.runs import TINY

FLAGS = [*TINY, "--model-type", "bert", "--geglu", "--data-path", "D", "--sparsity-recipe", "dense"]
FLAGS += ["--masked-decay", "none", "--mask-update-interval", "none"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
VOCAB, HIDDEN, HEADS, LENGTHS = 128, 64, 4, (32, 20)
CHECKED = ("word_embeddings", "position", "tokentype", "layers.0", "final", "lm_head", "binary")


def _batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (2, 32), generator=draw)
    seen = (torch.arange(32) < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "tokens": tokens,
        "labels": torch.randint(VOCAB, (2, 32), generator=draw),
        "loss_mask": (torch.rand(2, 32, generator=draw) < 0.3).float() * seen,
        "types": (torch.arange(32) > 8).long().expand(2, 32) * seen,
        "padding_mask": seen,
        "is_random": torch.tensor([1, 0]),
    }


def _computed(rank: int, world: int, flags: list[str]) -> dict[str, torch.Tensor]:
    """Whole parameters, and of some of them whole gradients; the loss."""
    from megasparse.config import load_config, resolve
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.init import parameter_shard
    from megasparse.megatron.model import build_model
    from megasparse.train.engine.bert_loss import BertLoss

    config = resolve(load_config(flags), world)
    grid = make_grid(config.parallel.tensor_model_parallel_size, torch.device("cpu"), 1)
    model = build_model(config, grid, VOCAB)
    with torch.no_grad():  # biases that matter
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
                draw = torch.Generator().manual_seed(len(name))
                noise = torch.randn(shard.global_shape, generator=draw) * 0.1
                parameter += shard.slice_of(noise)
    loss = BertLoss(model, grid)
    total = loss(_batch())
    total.backward()
    parts = loss.take_parts()
    found = {"loss": total.detach(), "parts": torch.tensor([parts["lm_loss"], parts["sop_loss"]])}
    for name, parameter in model.named_parameters():
        shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
        grad = parameter.grad.clone()
        if getattr(parameter, "sequence_parallel", False) and grid.tp_size > 1:
            grid.sum_over_tp(grad)
        for kind, value in (("", parameter.detach()), ("grad ", grad)):
            whole = torch.zeros(shard.global_shape)
            shard.write_into(whole, value)
            sharded = shard.world > 1
            found[kind + name] = grid.sum_over_tp(whole) if sharded else whole
    return found


def _reference(weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, written out: pre-norm layers, attention to every token that is no padding."""
    w, batch = weights, _batch()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    words = w["embedding.word_embeddings.weight"]
    x = words[batch["tokens"]] + w["embedding.position_embeddings.weight"]
    x = x + w["embedding.tokentype_embeddings.weight"][batch["types"]]
    for number in range(2):
        layer = f"encoder.layers.{number}"
        fused = linear(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attention.linear_qkv")
        q, k, v = fused.view(2, 32, HEADS, 3, HIDDEN // HEADS).permute(3, 0, 2, 1, 4)
        scores = q @ k.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5
        scores = scores.masked_fill(batch["padding_mask"][:, None, None] == 0, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{layer}.self_attention.linear_proj")
        gate, up = linear(norm(x, f"{layer}.pre_mlp_layernorm"), f"{layer}.mlp.linear_fc1").chunk(
            2, -1
        )
        x = x + linear(functional.gelu(gate, approximate="tanh") * up, f"{layer}.mlp.linear_fc2")
    x = norm(x, "encoder.final_layernorm")
    head = norm(functional.gelu(linear(x, "lm_head.dense")), "lm_head.layer_norm")
    logits = functional.linear(head, words, w["output_layer.bias"])
    losses = functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
    )
    mask = batch["loss_mask"].flatten()
    order = linear(torch.tanh(linear(x[:, 0], "pooler.dense")), "binary_head")
    return (losses * mask).sum() / mask.sum(), functional.cross_entropy(order, batch["is_random"])


def test_loss_and_gradients_are_those_of_plain_torch():
    (one,) = dist.run(_computed, 1, FLAGS)
    weights = {
        name: value.clone().requires_grad_()
        for name, value in one.items()
        if "." in name and not name.startswith("grad ")
    }
    masked, order = _reference(weights)
    torch.testing.assert_close(one["parts"], torch.stack([masked, order]).detach())
    torch.testing.assert_close(one["loss"], (masked + order).detach())
    (masked + order).backward()
    for name, weight in weights.items():
        torch.testing.assert_close(one[f"grad {name}"], weight.grad, rtol=1e-4, atol=1e-6)
    assert all(any(part in name for name in weights) for part in CHECKED)

    first, second = dist.run(_computed, 2, [*FLAGS, *TP2])
    assert first.keys() == second.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(second[name], first[name], rtol=1e-6, atol=1e-7, msg=name)
