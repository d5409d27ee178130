"""Which chooser asks a GPU for its fastest GEMMs: the one that is given, or the GPU's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.sparsity.gemms import (
    expert_products,
    packed_experts,
    packed_fp8,
    packed_fp8_experts,
)
from megasparse.sparsity.gemms.packed_experts import PackedExpertGemms
from megasparse.sparsity.gemms.packed_fp8 import PackedFp8Gemms
from megasparse.sparsity.gemms.packed_fp8_experts import PackedFp8ExpertGemms

MADE = {
    PackedFp8Gemms: packed_fp8,
    PackedFp8ExpertGemms: packed_fp8_experts,
    PackedExpertGemms: packed_experts,
}


class Far(Exception):
    """Far enough."""


@pytest.mark.parametrize("given", [None, "given"])
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("kind", MADE)
def test_the_gpus_own_unless_one_is_given(monkeypatch, kind, cuda, given):
    """Once; on a CPU there is nothing to choose from."""
    asked: list[str] = []
    module = MADE[kind]
    monkeypatch.setattr(module, "shared_chooser", lambda device: asked.append(device) or "own")

    class Weight:
        """Whatever else is asked of it ends the call."""

        is_cuda, device = cuda, "its place"

        def detach(self) -> Any:
            return self

        def __getattr__(self, name: str) -> Any:
            raise Far

    gemms = kind.__new__(kind)
    gemms._chooser = given

    def refill() -> None:
        with pytest.raises((Far, AttributeError)):
            gemms.refill(Weight(), SimpleNamespace(error_flag=None))

    refill()
    refill()
    own = given is None and (cuda or kind is PackedExpertGemms)
    assert gemms._chooser == ("own" if own else given)
    assert asked == ["its place"] * own


@pytest.mark.parametrize(
    ("wrong", "factor", "reason"),
    [
        (None, 1.0, None),
        ("products", 1.0, None),
        ("products", 1.004, None),
        ("products", 1.02, "output is wrong"),
        ("products", float("nan"), "output is wrong"),
        ("sums", 1.02, "grad_weight is wrong"),
        ("products", None, "output: no such type"),
        ("sums", None, "grad_weight: no such type"),
    ],
)
def test_grouped_products_are_taken_where_they_are_right(monkeypatch, wrong, factor, reason):
    """The library's are private: they are compared with one GEMM an expert."""
    singles = {"products": expert_products.scaled_products, "sums": expert_products.scaled_sums}

    def grouped(name: str) -> Any:
        def run(*given: Any) -> torch.Tensor:
            if name == wrong and factor is None:
                raise RuntimeError("no such type\nand more")
            found = singles[name](*given, False)
            if name == "sums":
                found[1] = torch.nan  # of an expert without rows it may be anything
            return found.float() * factor if name == wrong and factor else found

        return run

    for name in singles:
        monkeypatch.setattr(expert_products, f"_grouped_{name}", grouped(name))
    found = expert_products._grouped_disagreement.__wrapped__(torch.device("cpu"))
    assert found == reason
