"""The vocabulary-parallel divergence: a float64 reference, every way of dividing the vocabulary."""

from __future__ import annotations

import pytest
import torch

from tests import dist

TOKENS, VOCAB, PADDED, T = (3, 2), 21, 24, 2.0


def _logits(dtype):
    generator = torch.Generator().manual_seed(4)
    student, teacher = (
        4 * torch.randn(*TOKENS, PADDED, generator=generator, dtype=torch.float64) for _ in "ab"
    )
    # Padding that would dominate both softmaxes if it took part.
    student[..., VOCAB:], teacher[..., VOCAB:] = 30.0, 60.0
    return student.to(dtype), teacher.to(dtype), torch.randn(TOKENS, generator=generator)


def _reference(student, teacher, upstream):
    """By torch's own KL of log-probabilities, in float64."""
    s = student.double()[..., :VOCAB].requires_grad_()
    p, q = (torch.log_softmax(t / T, -1) for t in (teacher.double()[..., :VOCAB], s))
    kl = T**2 * torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    (kl * upstream.double()).sum().backward()
    return kl.detach(), s.grad


def _divided(rank, world, dtype):
    from megasparse.megatron.distillation import vocab_parallel_kl

    group = torch.distributed.group.WORLD
    student, teacher, upstream = _logits(dtype)
    here = slice(rank * PADDED // world, (rank + 1) * PADDED // world)
    part = student[..., here].contiguous().requires_grad_()
    kept = part.detach().clone()
    kl = vocab_parallel_kl(part, teacher[..., here], T, VOCAB, group)
    kl.backward(upstream.to(kl.dtype))
    assert torch.equal(part.detach(), kept)  # the logits are left as they are
    return kl.detach(), part.grad


@pytest.mark.parametrize("world", [1, 2, 4])
def test_divergence_and_gradient_equal_the_float64_reference(world):
    # On four ranks the last has three columns of six: the padding is uneven.
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        expected, gradient = _reference(*_logits(dtype))
        ranks = dist.run(_divided, world, dtype)
        whole = torch.cat([grad for _, grad in ranks], -1)
        for kl, _ in ranks:
            torch.testing.assert_close(kl.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            whole[..., :VOCAB].double(), gradient, rtol=tolerance, atol=tolerance
        )
        assert not whole[..., VOCAB:].any()


def test_a_rank_of_padding_alone_and_equal_logits():
    from megasparse.megatron.distillation import vocab_parallel_kl

    student, teacher, _ = _logits(torch.float32)
    same = vocab_parallel_kl(student, student, T, VOCAB)
    torch.testing.assert_close(same, torch.zeros(TOKENS), atol=1e-5, rtol=0)
    assert (vocab_parallel_kl(student, teacher, T, VOCAB) > 0.01).all()
    ((kl, first), (_, second)) = dist.run(_padding_alone, 2)
    expected, gradient = _reference(*_logits(torch.float64))
    alone = vocab_parallel_kl(*_logits(torch.float64)[:2], T, VOCAB)  # one rank needs no group
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(first, gradient)
    assert not second.any()


def _padding_alone(rank, world):
    from megasparse.megatron.distillation import vocab_parallel_kl

    student, teacher, upstream = _logits(torch.float64)
    padding = torch.full((*TOKENS, VOCAB), 9.0, dtype=torch.float64)
    part = (padding if rank else student[..., :VOCAB]).clone().requires_grad_()
    other = padding if rank else teacher[..., :VOCAB]
    kl = vocab_parallel_kl(part, other, T, VOCAB, torch.distributed.group.WORLD)
    kl.backward(upstream.double())
    return kl.detach(), part.grad


def test_a_small_divergence_is_not_lost_in_rounding():
    """Student and teacher nearly agree: KL is a thousandth, each log-probability about 11."""
    from megasparse.megatron.distillation import vocab_parallel_kl

    generator = torch.Generator().manual_seed(5)
    teacher = 0.3 * torch.randn(64, 50257, generator=generator)
    student = teacher + 0.05 * torch.randn(64, 50257, generator=generator)
    exact = vocab_parallel_kl(student.double(), teacher.double())
    assert 1e-3 < exact.mean() < 2e-3

    def error(kl):
        return (kl - exact).square().mean().sqrt()

    q, p = (torch.log_softmax(logits, -1) for logits in (student, teacher))
    plain = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    found = error(vocab_parallel_kl(student, teacher))
    assert found < 1.5e-7 and found < 0.5 * error(plain), (found, error(plain))
