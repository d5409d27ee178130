"""What a context-parallel rank computes of a batch, and what a stage hands on beside a teacher."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.megatron import teacher
from megasparse.megatron.context import attention, batch, share
from megasparse.megatron.context.chunks import by_rank, own_places
from megasparse.sparsity.shard import ALL_TOKENS, TokenShare
from tests.runs import TINY


class Group:
    """Stands for a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def _grid(rank: int, size: int, tp: int = 1) -> Any:
    return SimpleNamespace(cp_rank=rank, cp_size=size, tp_size=tp, cp_group=Group(rank, size))


def _batch() -> dict[str, torch.Tensor]:
    count = torch.arange(3 * 8).view(3, 8)
    mask = (torch.arange(3 * 64) % 5 == 0).view(3, 1, 8, 8)
    return {
        "tokens": count,
        "labels": count + 1,
        "position_ids": count % 8,
        "sample_id": count[:, :2],
        "loss_mask": (count % 3 == 0).float(),
        "attention_mask": mask,
    }


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_has_its_places_of_everything_and_its_part_of_the_divisor(size):
    whole = _batch()
    assert batch.own_tokens(whole, _grid(0, 1)) is whole
    for rank in range(size):
        own = batch.own_tokens(whole, _grid(rank, size))
        places = [p for run in own_places(8, rank, size) for p in run]
        for name in ("tokens", "labels", "position_ids", "loss_mask"):
            assert torch.equal(own[name], whole[name][:, places]), name
        assert torch.equal(own["attention_mask"], whole["attention_mask"][:, :, places])
        assert torch.equal(own["sample_id"], whole["sample_id"])
        assert float(own["divisor"]) == 8 / size
    told = batch.own_tokens({**whole, "divisor": torch.tensor(12.0)}, _grid(0, size))
    assert float(told["divisor"]) == 12 / size
    nothing = {**whole, "loss_mask": torch.zeros(3, 8)}
    assert float(batch.own_tokens(nothing, _grid(0, size))["divisor"]) == 1 / size


@pytest.mark.parametrize(("size", "tp"), [(1, 1), (2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("length", [7, 8, 12])
def test_logits_of_a_prompt_of_any_length_are_in_order(monkeypatch, size, tp, length):
    """Each token's logits tell the token and its position."""
    tokens, positions = torch.arange(50, 50 + length)[None], torch.arange(length)[None]
    asked: list[torch.Size] = []

    def compute(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        asked.append(tokens.shape)
        return torch.stack([tokens, positions], -1).float()

    def gathered(local: torch.Tensor, group: Group) -> torch.Tensor:
        assert group.size() == size
        whole = torch.zeros(local.shape[0] * size, 1, 2)
        filled = (torch.nn.functional.pad(t, (0, len(whole) - length)) for t in (tokens, positions))
        whole = torch.stack(list(filled), -1).transpose(0, 1).float()
        places = [p for run in own_places(len(whole), 1, size) for p in run]
        assert torch.equal(whole[places], local)
        return whole

    monkeypatch.setattr(batch, "gather_sequence", gathered)
    logits = batch.whole_logits(compute, tokens, positions, _grid(min(1, size - 1), size, tp))
    assert logits.tolist() == [[[50 + n, n] for n in range(length)]]
    ((_, here),) = asked
    assert here * size >= length and (size == 1 or here * size % (2 * size * tp) == 0)
    assert here * size - length < 2 * size * tp


@pytest.mark.parametrize("size", [1, 2, 3])
def test_queries_see_the_keys_up_to_their_own_places(size):
    length, device = 12, torch.device("cpu")
    whole = torch.ones(length, length).tril().bool()
    for rank in range(size):
        group: Any = Group(rank, size)
        places = attention.query_places(length, rank, size, device)
        assert places.tolist() == [p for run in own_places(length, rank, size) for p in run]
        assert torch.equal(attention.own_causal_mask(length, group, device), whole[places])


def test_keys_and_values_travel_together_and_their_gradients_are_summed(monkeypatch):
    size = 2
    calls: list[str] = []

    def gather(whole: torch.Tensor, local: torch.Tensor, group: Group) -> None:
        calls.append("gather")
        whole.copy_(torch.cat([local, local + 100]))

    def scatter(local: torch.Tensor, whole: torch.Tensor, group: Group) -> None:
        calls.append("scatter")
        local.copy_(whole[: len(local)] + whole[len(local) :])

    monkeypatch.setattr(attention.dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(attention.dist, "reduce_scatter_tensor", scatter)
    group: Any = Group(0, size)
    key = torch.arange(24.0).view(4, 1, 2, 3).requires_grad_()
    value = (key.detach() + 1000).requires_grad_()
    whole_key, whole_value = attention.gather_keys_and_values(key, value, group)
    assert calls == ["gather"]
    assert torch.equal(by_rank(whole_key, size), torch.cat([key, key + 100]))
    assert torch.equal(by_rank(whole_value, size), torch.cat([value, value + 100]))
    factors = torch.arange(8.0).view(8, 1, 1, 1)
    (whole_key * factors + 2 * whole_value * factors).sum().backward()
    assert calls == ["gather", "scatter"]
    first, second = by_rank(factors, size).chunk(2)
    assert torch.equal(key.grad, (first + second).expand_as(key))
    assert torch.equal(value.grad, 2 * key.grad)


def test_layers_know_their_share_of_the_tokens(monkeypatch):
    monkeypatch.setattr(share.parallel_state, "get_context_parallel_rank", lambda: 3)
    assert share.token_share(SimpleNamespace(context_parallel_size=4)) == TokenShare(3, 4)
    for config in (SimpleNamespace(), SimpleNamespace(context_parallel_size=1)):
        assert share.token_share(config) is ALL_TOKENS


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_pair_is_taken_apart_as_it_was_put_together(with_mask):
    hidden, mask = torch.randn(4, 2, 8), torch.ones(2, 1, 4, 4, dtype=torch.uint8)
    theirs = torch.randn(8, 2, 4).to(torch.bfloat16).transpose(0, 2)  # not contiguous
    student: Any = (hidden, mask) if with_mask else hidden
    handed = teacher.pair(student, theirs, last=False)
    assert handed[1].dtype == torch.uint8 and len(handed) == 2 + with_mask
    ours, others = teacher.unpair(handed)
    if with_mask:
        assert ours[0] is hidden and ours[1] is mask and others[1] is mask
    else:
        assert ours is hidden and len(others) == 1
    assert torch.equal(others[0].view(torch.bfloat16), theirs)
    assert teacher.pair(hidden, theirs, last=True)[1] is theirs  # logits for the loss


@pytest.mark.parametrize(
    ("dtype", "run_bf16", "expected"),
    [
        (None, True, True),
        (None, False, False),
        ("bf16", False, True),
        ("fp32", True, False),
        ("fp8", True, True),
    ],
)
def test_a_teacher_has_its_own_precision_and_recomputes_nothing(dtype, run_bf16, expected):
    flags = [*TINY, "--mock-data", "--recompute-granularity", "full"]
    flags += ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
    config = resolve(load_config(flags), 1)
    train = dataclasses.replace(config.train, bf16=run_bf16)
    kept = dataclasses.replace(config.distillation, teacher_dtype=dtype)
    own = teacher._teacher_config(dataclasses.replace(config, train=train, distillation=kept))
    assert own.train.bf16 is expected
    parallel = own.parallel
    assert parallel.recompute_granularity is parallel.recompute_method is None
    assert parallel.recompute_num_layers is None
    assert config.parallel.recompute_granularity == "full"  # the student's
