"""Uninitialised memory made visible: an element that a kernel does not write fails its test."""

from __future__ import annotations

import pytest
import torch


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like give NaN (floats) or all ones (bytes) from now on."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(255)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k)))
