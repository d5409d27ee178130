"""What a layout reports of its micro-batches, with an engine whose losses are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasparse.megatron.loss import masked_mean
from megasparse.sparsity.clock import Clock
from megasparse.sparsity.gradient_sum import StepSums
from megasparse.timer import StepTimer
from megasparse.train.distillation import Distillation
from megasparse.train.engine.pipeline import PipelineLayout, _pairs
from megasparse.train.engine.plain import LanguageModelLoss, PlainLayout
from megasparse.train.engine.step_guard import MicroBatch, StepGuard


class _Engine:
    """DeepSpeed's engine of a model whose loss is what the batch says."""

    training = True

    def __init__(self) -> None:
        self.module = self
        self.backwards = []

    def __call__(self, batch):
        return batch["loss"]

    def eval(self):
        self.training = False

    def train(self):
        self.training = True

    def backward(self, loss):
        self.backwards.append(float(loss))

    def step(self):
        pass


def _layout(kind, accumulation_steps, dp_size=1, dp_rank=0):
    layout = kind.__new__(kind)
    layout.config = None
    layout.grid = SimpleNamespace(
        device=torch.device("cpu"),
        dp_size=dp_size,
        cp_size=1,
        dp_rank=dp_rank,
        rank=0,
        world=1,
        mean_over_dp_cp=lambda value: 10 * value,
    )
    layout.controller = SimpleNamespace(clock=Clock(1, 10), timer=StepTimer())
    layout.guard = StepGuard(layout.grid, torch.nn.Module(), layout.controller)
    layout.accumulation_steps = accumulation_steps
    layout.graphs = layout.gradients = layout.distillation = None
    layout.sums = StepSums()
    layout._events = lambda *_: None
    layout._engine = _Engine()
    return layout


def _losses(*values):
    return iter([{"loss": torch.tensor(value)} for value in values])


def test_the_reported_loss_is_the_mean_over_micro_batches_and_ranks():
    layout = _layout(PlainLayout, 4)
    assert layout.compute_and_update(_losses(1.0, 2.0, 3.0, 8.0)) == 10 * 3.5
    assert layout._engine.backwards == [1.0, 2.0, 3.0, 8.0]
    assert layout.evaluate(_losses(1.0, 2.0, 6.0), 3) == 10 * 3.0
    assert layout.evaluate(_losses(), 3, lambda: True) is None
    assert not layout._engine.training
    layout.compute_and_update(_losses(1.0, 2.0, 3.0, 8.0))
    assert layout._engine.training


@pytest.mark.parametrize("place", [(1, 0), (4, 2)])
def test_a_step_that_is_computed_again_draws_the_numbers_of_its_micro_batches(place):
    layout = _layout(PlainLayout, 3, *place)
    weight, seen = torch.nn.Parameter(torch.ones(2)), []
    layout.model = torch.nn.Linear(1, 1)

    def loss(batch):
        seen.append(layout.controller.clock.micro_batch)
        return (layout.model.weight * batch["loss"]).sum()

    layout._engine.module = loss
    samples = {"samples": torch.tensor([5, 6])}
    numbers = [layout._number(n) for n in range(3)]
    kept = [
        MicroBatch({"loss": torch.tensor(value), **samples}, number)
        for number, value in zip(numbers, (1.0, float("nan"), 2.0), strict=True)
    ]
    found = layout.compute_again(kept)
    assert seen == numbers == [place[1] + n * place[0] for n in range(3)]
    assert any("the loss is nan on rank 0, micro-batch 1" in line for line in found)
    assert not any("micro-batch 0" in line or "micro-batch 2" in line for line in found)
    assert weight.grad is None


@pytest.mark.parametrize("iterations", [3, 4, 6, 9])
def test_every_batch_of_a_validation_set_counts_the_same_in_a_pipeline(iterations):
    """The last group may be smaller than the others."""
    layout, given = _layout(PipelineLayout, 4), [float(n * n) for n in range(iterations)]
    left = iter(given)

    def eval_batch(pairs, num_micro_batches):
        return sum(next(left) for _ in range(num_micro_batches)) / num_micro_batches

    layout._engine.eval_batch = eval_batch
    assert layout.evaluate(iter([]), iterations) == pytest.approx(sum(given) / iterations)


def test_a_pipeline_gets_the_attention_mask_where_there_is_one():
    batch = {name: name for name in ("tokens", "position_ids", "labels", "loss_mask")}
    (plain,) = _pairs(iter([batch]))
    (masked,) = _pairs(iter([{**batch, "attention_mask": "mask"}]))
    assert plain == (("tokens", "position_ids"), ("labels", "loss_mask"))
    assert masked == (("tokens", "position_ids", "mask"), ("labels", "loss_mask"))


def test_the_model_gets_the_attention_mask_and_masked_tokens_do_not_count():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, tokens, position_ids, attention_mask, labels):
            seen.append(attention_mask)
            return labels.float()

    loss = LanguageModelLoss(Model())
    batch = {
        "tokens": torch.zeros(1, 4).long(),
        "position_ids": torch.arange(4)[None],
        "labels": torch.tensor([[1, 2, 30, 40]]),
        "loss_mask": torch.tensor([[1.0, 1.0, 0.0, 0.0]]),
    }
    assert float(loss(batch)) == 1.5 and seen == [None]
    mask = torch.ones(1, 1, 4, 4).triu(1).bool()
    loss({**batch, "attention_mask": mask})
    assert seen[1] is mask


def test_masked_tokens_count_in_neither_part_of_a_student_loss():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    labels = torch.randint(8, (2, 3), generator=generator)
    mask = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    distillation = Distillation.__new__(Distillation)
    distillation._settings = SimpleNamespace(
        kd_temperature=2.0, kd_loss_weight=0.7, lm_loss_weight=0.3
    )
    distillation._grid = SimpleNamespace(tp_group=None, world=1)
    distillation._vocab_size, distillation._sums = None, torch.zeros(3)
    q, p = (torch.log_softmax(t / 2, -1) for t in (student, teacher))
    kl = 4 * torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    each = torch.nn.functional.cross_entropy(student.mT, labels, reduction="none")
    kd, lm = kl[mask.bool()].mean(), each[mask.bool()].mean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "megasparse.train.distillation.token_cross_entropy",
            lambda logits, targets: torch.nn.functional.cross_entropy(
                logits.mT, targets, reduction="none"
            ),
        )
        found = distillation.loss(student.clone(), teacher, labels, mask)
    assert float(found) == pytest.approx(0.7 * float(kd) + 0.3 * float(lm), rel=1e-5)
    parts = distillation.take_parts()
    assert parts == pytest.approx({"kd_loss": float(kd), "lm_loss": float(lm)}, rel=1e-5)
    assert distillation.take_parts() == {"kd_loss": 0.0, "lm_loss": 0.0}
    assert float(masked_mean(each, mask)) == pytest.approx(float(lm))
