"""What is compared over which ranks, and who is named: ranks that are threads of this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.errors import ReplicaError
from megasparse.fp8.delayed import DelayedScaling
from megasparse.megatron import consistency
from megasparse.megatron.consistency import digest


class World:
    """Stands for torch.distributed, on one rank; the others have digests that are given here.

    Args:
        others: by group, how the digests of each other rank differ from this one's: place -> value.
    """

    def __init__(self, ranks: dict[str, list[int]], others: dict[str, dict[int, dict[int, int]]]):
        self.ranks, self.others = ranks, others
        self.told: list[list[str]] = []
        self.tables: list[str] = []

    def get_process_group_ranks(self, group: str) -> list[int]:
        return self.ranks[group]

    def all_gather_into_tensor(self, table: torch.Tensor, mine: torch.Tensor, group: str) -> None:
        self.tables.append(group)
        rows = table.view(len(self.ranks[group]), len(mine))
        rows.copy_(mine.expand_as(rows))
        for rank, changes in self.others.get(group, {}).items():
            for place, value in changes.items():
                rows[self.ranks[group].index(rank), place] = value

    def all_reduce(self, count: torch.Tensor) -> None:
        count += sum(map(len, self.told))

    def all_gather_object(self, everywhere: list[Any], found: list[str]) -> None:
        everywhere[:] = [*self.told, found]


def _grid(world=8, **sizes: int) -> Any:
    names = {"cp_size": 1, "dp_cp_size": 1, "tp_size": 1, "pp_size": 1, "ep_size": 1, **sizes}
    groups = {f"{group}_group": group for group in ("dp_cp", "tp", "pp")}
    replicas = SimpleNamespace(size=2, group="experts")
    cpu = torch.device("cpu")
    return SimpleNamespace(world=world, device=cpu, expert_replicas=replicas, **names, **groups)


class Model(torch.nn.Module):
    """A sharded and a replicated parameter, and one of divided experts."""

    def __init__(self) -> None:
        super().__init__()
        self.sharded, self.whole, self.expert = (
            torch.nn.Parameter(torch.full((3,), float(n))) for n in (1, 2, 3)
        )
        self.sharded.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.expert.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.expert.allreduce = False  # type: ignore[attr-defined]


def _controller(model: Model, fp8: Any = None) -> Any:
    def state(name: str) -> Any:
        one = torch.ones(1)
        return SimpleNamespace(name=name, mask=one > 0, scale=None, last_refresh=4, refreshes=2)

    weights = [(state("sharded"), model.sharded), (state("expert"), model.expert)]
    return SimpleNamespace(weights=weights, fp8=fp8)


def _check(monkeypatch, others=None, told=(), ranks=None, fp8=None, **sizes) -> World:
    ranks = ranks or {name: [0, 1] for name in ("dp_cp", "tp", "pp", "experts")}
    world = World(ranks, others or {})
    world.told = list(told)
    monkeypatch.setattr(consistency, "dist", world)
    model = Model()
    consistency.check_replicas(model, _controller(model, fp8), _grid(**sizes), 7)
    return world


@pytest.mark.parametrize(
    ("sizes", "compared"),
    [
        ({}, []),
        ({"dp_cp_size": 2}, ["dp_cp"]),
        ({"tp_size": 2}, ["tp"]),
        ({"pp_size": 2}, []),  # without tied embeddings: see below
        ({"ep_size": 2}, ["experts"]),
        ({"dp_cp_size": 2, "tp_size": 2, "ep_size": 2}, ["dp_cp", "experts", "tp"]),
        ({"world": 1, "tp_size": 2}, ["tp"]),
    ],
)
def test_groups_of_more_than_one_rank_are_compared(monkeypatch, sizes, compared):
    tables = _check(monkeypatch, **sizes).tables
    assert [name for name in tables if name != "pp"] == compared
    assert ("pp" in tables) == ("pp_size" in sizes)


def test_each_group_compares_what_its_ranks_hold_alike():
    model, grid = Model(), _grid()
    fp8 = DelayedScaling(torch.device("cpu"))
    fp8.quantizer()
    fp8.allocate()
    controller = _controller(model, fp8)
    names = [name for name, _ in consistency._data_parallel(model, controller)]
    scales = ["FP8 scales", "FP8 history"]
    assert names == ["sharded", "whole", "mask of sharded", "scale of sharded", *scales]
    names = [name for name, _ in consistency._data_parallel(model, controller, divided=True)]
    assert names == ["expert", "mask of expert", "scale of expert"]
    found = consistency._tensor_parallel(model, controller, grid)
    counters = [
        f"{what} of {name}"
        for name in ("sharded", "expert")
        for what in ("scale", "refresh counters")
    ]
    assert [name for name, _ in found] == ["whole", *counters, *scales]
    assert dict(found)["refresh counters of expert"].tolist() == [4, 2]
    controller.fp8 = object()  # current scaling keeps nothing
    assert consistency._fp8(controller) == []
    model.whole.ds_tensor = torch.zeros(1)  # type: ignore[attr-defined]
    kept = dict(consistency._tensor_parallel(model, controller, grid))["whole"]
    assert kept is model.whole.ds_tensor  # the part that ZeRO 3 keeps
    ((name, missing),) = consistency._tied(model, grid)
    assert name == "embedding.word_embeddings.weight" and missing is None


@pytest.mark.parametrize(
    ("sizes", "group", "kind"),
    [
        ({"dp_cp_size": 3}, "dp_cp", "data"),
        ({"dp_cp_size": 3, "cp_size": 2}, "dp_cp", "data and context"),
        ({"ep_size": 2}, "experts", "expert data"),
        ({"tp_size": 2}, "tp", "tensor"),
    ],
)
def test_who_is_unlike_most_is_named_with_the_kind_of_its_group(monkeypatch, sizes, group, kind):
    ranks = {name: [4, 5, 6] for name in ("dp_cp", "tp", "pp", "experts")}
    name = {"dp_cp": "sharded", "experts": "expert", "tp": "whole"}[group]
    with pytest.raises(ReplicaError) as refused:
        _check(monkeypatch, {group: {5: {0: 1}}}, ranks=ranks, **sizes)
    line = f"{name} on rank 5 differs from rank 4's ({kind} parallel)"
    assert str(refused.value) == f"step 7: replicas differ: {line}"


@pytest.mark.parametrize(
    ("digests", "lines"),
    [
        ([1, 1, 1], []),
        ([1, 2, 2], ["t on rank 4 differs from rank 6's"]),
        ([1, 2, 3], ["t on rank 6 differs from rank 4's", "t on rank 8 differs from rank 4's"]),
        ([0, 2, 2], []),  # not there
        ([0, 2, 1], ["t on rank 8 differs from rank 6's"]),
        ([0, 0, 5], []),
    ],
)
def test_of_equals_the_first_is_right_and_what_is_not_there_is_no_replica(
    monkeypatch, digests, lines
):
    ranks = [4, 6, 8]
    given = {rank: {0: value} for rank, value in zip(ranks, digests, strict=True)}
    monkeypatch.setattr(consistency, "dist", World({"g": ranks}, {"g": given}))
    found = consistency._differences([("t", None)], "g", _grid())  # type: ignore[arg-type]
    assert found == lines
    assert consistency._differences([], "g", _grid()) == []  # type: ignore[arg-type]


def test_a_message_names_eight_of_all_ranks_once_each(monkeypatch):
    def raised(count: int) -> str:
        told = [[f"line {n}" for n in range(count)], ["line 0"]]
        others = {"dp_cp": {1: {0: 1}}}
        with pytest.raises(ReplicaError) as refused:
            _check(monkeypatch, others, told, dp_cp_size=2)
        return str(refused.value)

    assert raised(7).endswith("line 6; sharded on rank 1 differs from rank 0's (data parallel)")
    assert raised(8).endswith("line 7; and 1 more") and raised(8).count("line 0") == 1
    assert raised(12).endswith("line 7; and 5 more")


def test_a_digest_is_of_bytes_wherever_they_lie():
    values = torch.arange(40, dtype=torch.float32)
    for part in (values[2:9], values[1:2], values[4:4], values.view(5, 8)[:, 3]):
        assert digest(part) == digest(part.clone())
    assert int(digest(values[:0])) == 0
    bytes_ = torch.arange(64, dtype=torch.uint8)
    assert digest(bytes_[8:]) == digest(bytes_[8:].clone())


def test_what_another_rank_has_found_is_raised_here_too(monkeypatch):
    _check(monkeypatch, told=[[], []], dp_cp_size=2)
    with pytest.raises(ReplicaError, match="step 7: replicas differ: theirs$"):
        _check(monkeypatch, told=[[], ["theirs"]], dp_cp_size=2)
    # A run of one rank has nobody to ask.
    _check(monkeypatch, told=[["theirs"]], world=1)
