"""What DeepSpeed hears about process groups: each question is Megatron's own of that name."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path

import pytest

import megasparse.megatron
from megasparse import extras
from megasparse.megatron import model_parallel_unit as module

# Question -> Megatron's, and whether context parallel ranks count as data parallel ones.
ASKED = {
    f"get_{kind}_{what}": f"get_{theirs}_{what}"
    for kind, theirs in (
        ("model_parallel", "tensor_model_parallel"),
        ("tensor_model_parallel", "tensor_model_parallel"),
        ("pipeline_model_parallel", "pipeline_model_parallel"),
        ("data_parallel", "data_parallel"),
    )
    for what in ("rank", "world_size", "group")
}


@pytest.fixture
def unit(monkeypatch):
    """Made of a Megatron whose answers are the questions."""
    for name in set(ASKED.values()):
        monkeypatch.setattr(
            module.parallel_state, name, lambda *given, name=name, **how: (name, given, how)
        )
    yield importlib.reload(module).ModelParallelUnit()
    monkeypatch.undo()
    importlib.reload(module)


def test_every_question_is_megatrons(unit):
    questions = {name for name in dir(unit) if name.startswith("get_")}
    assert questions == set(ASKED)
    for question, theirs in ASKED.items():
        # State is divided over context parallel ranks too: they hold the same parameters.
        how = {"with_context_parallel": True} if "data_parallel" in question else {}
        assert getattr(unit, question)() == (theirs, (), how)


def test_megatron_core_is_asked_for_by_the_name_of_its_extra(monkeypatch):
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(extras, "require", lambda *names: asked.append(names))
    runpy.run_path(str(Path(megasparse.megatron.__file__ or "")))
    assert asked == [("megatron", "megasparse.megatron")]
