"""One launch for all experts computes what one GEMM an expert does; factors of plain operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megasparse.fp8.scale import Scale
from megasparse.kernels import activated
from megasparse.kernels.packed24 import E4M3
from megasparse.sparsity.gemms import expert_products, experts
from megasparse.sparsity.gemms.dense import DenseGemms
from megasparse.sparsity.gemms.expert_tokens import ExpertTokens
from megasparse.sparsity.gemms.experts import DenseExpertGemms, ExpertGradOutput, ends_of

E, N, K, COUNTS = 3, 16, 8, [5, 0, 7]


def test_ends_are_sums_of_counts():
    ends = ends_of(COUNTS, torch.device("cpu"))
    assert ends.tolist() == [5, 5, 12] and ends.dtype == torch.int32


def test_a_launch_is_for_16_bits_on_a_gpu_that_asks_for_it(monkeypatch):
    """Here its product is torch's on the CPU."""
    torch.manual_seed(0)
    w = torch.randn(E * N, K).bfloat16()
    x, dz = torch.randn(12, K).bfloat16(), torch.randn(12, N).bfloat16()
    tokens = ExpertTokens(COUNTS)
    calls: list[int] = []
    grouped = experts._grouped_mm
    monkeypatch.setattr(experts, "_grouped_mm", lambda *a: calls.append(1) or grouped(*a))

    def computed() -> list[torch.Tensor]:
        gemms = DenseExpertGemms(E, True, w)
        operands = ExpertGradOutput(dz, tokens, 0)
        found = [gemms.output(x, tokens), gemms.grad_input(operands)]
        return [*found, gemms.grad_weight(operands, (x,))]

    singly = computed()
    assert not calls
    monkeypatch.setattr(DenseExpertGemms, "_in_one_launch", lambda self, like: True)
    together = computed()
    assert len(calls) == 3
    for ours, theirs in zip(together, singly, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)
    expected = [dz[:5].t() @ x[:5], torch.zeros(N, K).bfloat16(), dz[5:].t() @ x[5:]]
    torch.testing.assert_close(singly[2], torch.cat(expected))


def _library(a: Any, b: Any, scale_a: Any, scale_b: Any, *, offs: Any, **how: Any) -> torch.Tensor:
    """What the private function is documented to compute."""
    assert how == {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    starts = [0, *offs.tolist()]
    parts = list(zip(starts, starts[1:], strict=False))
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    if b.dim() == 3:  # rows of each expert times its matrix
        assert scale_a.shape == a.shape[:1] and scale_b.shape == (b.shape[0], b.shape[2])
        z = [
            (a[i:j].float() * scale_a[i:j, None]) @ (m.float() * s)
            for (i, j), m, s in zip(parts, b, scale_b, strict=True)
        ]
        return torch.cat(z).bfloat16()
    left, right = scale_a.view(len(parts), -1), scale_b.view(len(parts), -1)
    assert (left.shape[1], right.shape[1]) == (a.shape[0], b.shape[1])
    z = [
        (a[:, i:j].float() * p[:, None]) @ (b[i:j].float() * q)
        for (i, j), p, q in zip(parts, left, right, strict=True)
    ]
    return torch.stack(z).bfloat16()


@pytest.mark.parametrize("what", ["products", "sums"])
def test_grouped_8_bit_products_are_those_one_by_one(monkeypatch, what):
    monkeypatch.setattr(torch, "_scaled_grouped_mm", _library)
    torch.manual_seed(0)

    def scale(value: float) -> Scale:
        return Scale(torch.tensor(1 / value), torch.tensor(value))

    counts = [16, 0, 32]
    a = torch.randn(48, K) if what == "products" else torch.randn(N, 48)
    b = torch.randn(E, N, K) if what == "products" else torch.randn(K, 48)
    given = (a.to(E4M3), b.to(E4M3), counts, scale(0.5), scale(4.0))
    grouped = getattr(expert_products, f"_grouped_{what}")(*given)
    single = getattr(expert_products, f"scaled_{what}")(*given, False)
    assert grouped.dtype == single.dtype == torch.bfloat16
    torch.testing.assert_close(grouped, single, rtol=2e-2, atol=1e-2)
    assert single.any() and (what == "products" or not single[1].any())


@pytest.mark.parametrize("lacks", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_an_activation_is_of_the_product_with_all_its_factors(lacks, save):
    """And the product itself stays as it is: it is kept for the backward pass."""
    torch.manual_seed(0)
    gemms, product = DenseGemms(torch.randn(6, K)), torch.randn(5, 2 * K)
    kept, bias = product.clone(), torch.randn(6)
    factors = (torch.tensor(0.5), torch.tensor(8.0), 2.0) if lacks else None
    z, saved = gemms.output_of_activated(product, "swiglu", save, bias, factors)
    y = activated(product * 2 if lacks else product, "swiglu")
    expected, wanted = gemms.output_and_saved(y, bias, save)
    assert torch.equal(z, expected) and len(saved) == len(wanted) == save
    assert all(map(torch.equal, saved, wanted)) and torch.equal(product, kept)
