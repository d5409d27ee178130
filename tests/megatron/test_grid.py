"""The grid of ranks with stand-ins for its groups: who is asked, for what, and when nobody is."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasparse.megatron import grid as grid_module
from megasparse.megatron.grid import (
    Grid,
    Replicas,
    collective_timeout,
    is_divided_expert,
    rng_state,
    seed_dropout,
    set_rng_state,
)

SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX


def _grid(rank: int = 0, world: int = 1, **sizes: int) -> Grid:
    """Sizes of 1 unless given; a group is its own name."""
    fields: dict[str, Any] = {"rank": rank, "world": world, "device": torch.device("cpu")}
    for group in ("tp", "cp", "dp", "dp_cp", "pp", "ep"):
        fields |= {f"{group}_rank": 0, f"{group}_size": 1, f"{group}_group": group}
    fields["expert_replicas"] = Replicas(0, 1, "experts")  # type: ignore[arg-type]
    return Grid(**{**fields, "model_group": "model", **sizes})


@pytest.fixture
def asked(monkeypatch) -> list[tuple[Any, ...]]:
    """What collectives were called; a reduction leaves ten times the values."""
    calls: list[tuple[Any, ...]] = []

    def all_reduce(tensor: torch.Tensor, op: Any = SUM, group: Any = None) -> None:
        calls.append((op, group))
        tensor.mul_(10)

    def broadcast(tensor: torch.Tensor, **where: Any) -> None:
        calls.append(tuple(sorted(where.items())))
        tensor.fill_(7)

    def gather(values: list[Any], value: Any, group: Any = None) -> None:
        calls.append(("gather", group))
        values[:] = [f"{value}{n}" for n in range(len(values))]

    for name, fake in (
        ("all_reduce", all_reduce),
        ("broadcast", broadcast),
        ("all_gather_object", gather),
    ):
        monkeypatch.setattr(grid_module.dist, name, fake)
    return calls


REDUCTIONS = {
    # method: (sizes above 1, calls)
    "sum_over_ep": [({"ep_size": 2}, [(SUM, "ep")])],
    "sum_over_tp": [({"tp_size": 2}, [(SUM, "tp")])],
    "max_over_tp": [({"tp_size": 2}, [(MAX, "tp")])],
    "max_over_tp_ep": [
        ({"tp_size": 2}, [(MAX, "tp")]),
        ({"ep_size": 2}, [(MAX, "ep")]),
        ({"tp_size": 2, "ep_size": 2}, [(MAX, "tp"), (MAX, "ep")]),
    ],
    "max_over_tp_cp": [({"tp_size": 2}, [(MAX, "tp")]), ({"cp_size": 2}, [(MAX, "cp")])],
    "max_over_stage": [({"tp_size": 2}, [(MAX, "tp")]), ({"dp_cp_size": 2}, [(MAX, "dp_cp")])],
    "sum_over_model": [({"tp_size": 2}, [(SUM, "model")]), ({"pp_size": 2}, [(SUM, "model")])],
    "sum_over_dp_cp": [({"dp_cp_size": 2}, [(SUM, "dp_cp")])],
}


@pytest.mark.parametrize("method", REDUCTIONS)
def test_a_reduction_is_over_its_groups_in_place_and_over_none_of_one_rank(asked, method):
    everything = {f"{g}_size": 2 for g in ("tp", "cp", "dp", "dp_cp", "pp", "ep")}
    for sizes, calls in [({}, []), *REDUCTIONS[method]]:
        asked.clear()
        tensor = torch.ones(2)
        assert getattr(_grid(**sizes), method)(tensor) is tensor and asked == calls
        assert tensor.tolist() == [10.0 ** len(calls)] * 2
    used = {f"{group}_size" for _, calls in REDUCTIONS[method] for _, group in calls}
    others = {name: n for name, n in everything.items() if name not in used}
    if method != "sum_over_model":
        asked.clear()
        getattr(_grid(**others), method)(torch.ones(1))
        assert asked == []


def test_a_mean_is_the_sum_over_how_many(asked):
    mean = _grid(dp_cp_size=4).mean_over_dp_cp(torch.ones(2))
    assert mean.tolist() == [2.5, 2.5] and asked == [(SUM, "dp_cp")]
    assert _grid().mean_over_dp_cp(torch.ones(1)).tolist() == [1.0]


def test_values_come_from_the_rank_that_is_named(asked):
    assert _grid(rank=6, tp_rank=2, tp_size=4).from_first_of_tp(torch.ones(1)).item() == 7
    assert Replicas(1, 2, "group").from_rank(torch.ones(1), 1).item() == 7  # type: ignore[arg-type]
    assert asked == [(("group", "tp"), ("src", 4)), (("group", "group"), ("group_src", 1))]
    assert _grid(rank=6).from_first_of_tp(torch.ones(1)).item() == 1
    assert Replicas(0, 1, "group").from_rank(torch.ones(1), 0).item() == 1  # type: ignore[arg-type]
    assert _grid().gather_over_pp("a") == ["a"]
    assert len(asked) == 2
    assert _grid(pp_size=3).gather_over_pp("a") == ["a0", "a1", "a2"]
    assert asked[2:] == [("gather", "pp")]


def test_replicas_of_experts_are_others():
    grid = _grid(dp_cp_rank=1, dp_cp_size=4)
    plain, divided, local = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    divided.allreduce, local.allreduce = False, True  # type: ignore[attr-defined]
    assert [is_divided_expert(t) for t in (plain, divided, local)] == [False, True, False]
    assert grid.replicas_of(divided) is grid.expert_replicas
    for one in (plain, local):
        assert grid.replicas_of(one) == Replicas(1, 4, "dp_cp")  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_the_first_rank_builds_first_and_its_failure_is_that_of_all(
    monkeypatch, rank, world, fails
):
    if rank >= world:
        return
    events: list[str] = []
    failure = ValueError("no room")

    def told(message: list[Any], src: int) -> None:
        assert src == 0
        events.append("told")
        if rank:  # what rank 0 says
            message[0] = failure if fails else None

    def build() -> int:
        events.append("built")
        if fails and rank == 0:
            raise failure
        return 5

    monkeypatch.setattr(grid_module.dist, "broadcast_object_list", told)
    grid = _grid(rank=rank, world=world)
    if fails:
        with pytest.raises(ValueError, match="no room"):
            grid.first_rank_first(build)
    else:
        assert grid.first_rank_first(build) == 5
    wait = ["told"] if world > 1 else []
    first = ["built", *wait] if rank == 0 else wait
    assert events == first + (["built"] if rank and not fails else [])


def _drawn(**place: int) -> tuple[int, list[float], list[float]]:
    """The seed, and the first numbers outside and inside the tensor-parallel tracker."""
    seed_dropout(_grid(**place), 77)
    tracker = grid_module.megatron_random.get_cuda_rng_tracker()
    inside = torch.Generator()
    inside.set_state(tracker.get_states()["model-parallel-rng"])
    return torch.initial_seed(), torch.rand(4).tolist(), torch.rand(4, generator=inside).tolist()


def test_dropout_differs_where_activations_do(monkeypatch):
    """Among replicas and stages always; among tensor-parallel ranks in their own parts alone."""
    kept = torch.get_rng_state()
    try:
        seed, plain, own = _drawn()
        assert seed == 77 and plain != own
        generator = torch.Generator().manual_seed(77 + 2718)  # Megatron's offset
        assert own == torch.rand(4, generator=generator).tolist()
        assert _drawn(tp_rank=1)[:2] == (seed, plain)
        seeds, owns = [seed], [own, _drawn(tp_rank=1)[2], _drawn(tp_rank=2)[2]]
        for place in (
            {"dp_cp_rank": 1},
            {"pp_rank": 1},
            {"dp_cp_rank": 1, "pp_rank": 1},
            {"dp_cp_rank": 2},
            {"dp_cp_rank": 99, "pp_rank": 3},
        ):
            seeds.append(_drawn(**place)[0])
            owns.append(_drawn(**place)[2])
            expected = 77 + 100 * place.get("dp_cp_rank", 0) + 10007 * place.get("pp_rank", 0)
            assert seeds[-1] == expected  # as in every version before: same seed, same bits
        assert len(set(seeds)) == len(seeds) and len({str(one) for one in owns}) == len(owns)
    finally:
        torch.set_rng_state(kept)


def test_states_of_generators_are_put_back():
    kept = torch.get_rng_state()
    grid = _grid()
    try:
        seed_dropout(grid, 5)
        states = rng_state(grid)
        tracker = grid_module.megatron_random.get_cuda_rng_tracker()
        names = {f"tracker.{name}" for name in tracker.get_states()}
        assert states.keys() == names | {"cpu"} and len(names) == 3
        expected = torch.rand(3)
        seed_dropout(grid, 6)
        assert not torch.equal(rng_state(grid)["cpu"], states["cpu"])
        set_rng_state(grid, states)
        assert torch.equal(torch.rand(3), expected)
        found = rng_state(grid)
        assert all(torch.equal(found[name], states[name]) for name in names)
    finally:
        torch.set_rng_state(kept)


def test_a_gpus_generator_is_kept_beside_that_of_the_host(monkeypatch):
    kept = torch.get_rng_state()
    put: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([4, 2]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", put.append)
    grid = _grid(device=torch.device("cuda"))  # type: ignore[arg-type]
    try:
        seed_dropout(_grid(), 5)
        states = rng_state(grid)
        assert states["cuda"].tolist() == [4, 2] and "cpu" in states
        set_rng_state(grid, states)
        assert [state.tolist() for state in put] == [[4, 2]]
        assert "cuda" not in rng_state(_grid())
        set_rng_state(_grid(), rng_state(_grid()))
        assert len(put) == 1
    finally:
        torch.set_rng_state(kept)


def test_generators_of_a_gpu_are_seeded_by_megatron(monkeypatch):
    """Which seeds its tracker with them; on a CPU the tracker's are made here."""
    kept = torch.get_rng_state()
    asked: list[int] = []
    seed = grid_module.megatron_random
    monkeypatch.setattr(seed, "model_parallel_cuda_manual_seed", asked.append)
    monkeypatch.setattr(seed, "get_cuda_rng_tracker", lambda: pytest.fail("of the CPU"))
    try:
        where: Any = {"device": torch.device("cuda"), "dp_cp_rank": 2, "pp_rank": 1}
        seed_dropout(_grid(**where), 5)
        assert asked == [5 + 200 + 10007] and torch.initial_seed() == asked[0]
    finally:
        torch.set_rng_state(kept)


@pytest.mark.parametrize(("minutes", "asked_for"), [(10.0, 10), (0.2, 1), (1.6, 2), (0.0, 1)])
def test_groups_wait_for_whole_minutes_and_one_at_least(monkeypatch, minutes, asked_for):
    asked: dict[str, Any] = {}

    class State:
        """Stands for megatron-core's groups: a name for each question."""

        destroyed = False
        model_parallel_is_initialized = staticmethod(lambda: True)

        def destroy_model_parallel(self) -> None:
            self.destroyed = True

        def initialize_model_parallel(self, **options: Any) -> None:
            assert self.destroyed  # of an earlier run in this process
            asked.update(options)

        def __getattr__(self, name: str) -> Any:
            return lambda **more: (name, *sorted(more.items()))

    monkeypatch.setattr(grid_module, "parallel_state", State())
    monkeypatch.setattr(grid_module, "_use_cpu_in_megatron", lambda: None)
    monkeypatch.setattr(grid_module, "seed_dropout", lambda grid, seed: asked.update(seed=seed))
    monkeypatch.setattr(grid_module.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(grid_module.dist, "get_world_size", lambda: 48)
    grid = grid_module.make_grid(2, torch.device("cpu"), 9, minutes, 3, 2, 4)
    assert asked == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 3,
        "expert_model_parallel_size": 2,
        "context_parallel_size": 4,
        "distributed_timeout_minutes": asked_for,
        "create_gloo_process_groups": False,
        "seed": 9,
    }
    assert (grid.rank, grid.world, grid.tp_size, grid.cp_size) == (3, 48, 2, 4)
    assert (grid.pp_size, grid.ep_size) == (3, 2)
    of_both = (("with_context_parallel", True),)
    assert grid.dp_rank == ("get_data_parallel_rank",)
    assert grid.dp_cp_rank == ("get_data_parallel_rank", *of_both)
    assert grid.dp_cp_size == ("get_data_parallel_world_size", *of_both)
    assert grid.dp_cp_group == ("get_data_parallel_group", *of_both)
    assert collective_timeout(minutes) == datetime.timedelta(seconds=60 * minutes)


def test_sizes_are_one_unless_they_are_given(monkeypatch):
    asked: dict[str, Any] = {}
    state = SimpleNamespace(
        model_parallel_is_initialized=lambda: False,
        initialize_model_parallel=lambda **options: asked.update(options) or 1 / 0,
    )
    monkeypatch.setattr(grid_module, "parallel_state", state)
    monkeypatch.setattr(grid_module, "_use_cpu_in_megatron", lambda: None)
    with pytest.raises(ZeroDivisionError):  # far enough
        grid_module.make_grid(1, torch.device("cpu"), 9)
    sizes = {value for name, value in asked.items() if name.endswith("_size")}
    assert sizes == {1} and asked["distributed_timeout_minutes"] == 10
