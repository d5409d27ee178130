"""Ranks that read a checkpoint together get what each would read alone, and open few files."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.saver import open_together
from megasparse.checkpoint.shared_reader import Ask, SharedReader, _Place, _Stored
from megasparse.checkpoint.writer import Tensors, publish, write_rank_file
from megasparse.errors import CheckpointError
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import TensorFile
from tests.checkpoint.saves import META

# Name, shape, sharded dimension, fused parts, dtype.
PARAMETERS = [
    ("layer.qkv", (24, 8), 0, 1, torch.float32),
    ("layer.fc1", (48, 4), 0, 2, torch.bfloat16),
    ("layer.fc2", (10, 24), 1, 1, torch.bfloat16),
    ("norm", (13,), None, 1, torch.float32),
]


class Threads:
    """The control plane of ranks that are threads of this process."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.together = threading.Barrier(world)
        self.said: list[Any] = [None] * world

    def of(self, rank: int) -> Any:
        return _Thread(self, rank)


class _Thread:
    def __init__(self, all_ranks: Threads, rank: int) -> None:
        self._all, self.rank, self.world = all_ranks, rank, all_ranks.world

    def _gather(self, value: Any) -> list[Any]:
        self._all.said[self.rank] = value
        self._all.together.wait(30)
        said = list(self._all.said)
        self._all.together.wait(30)
        return said

    def broadcast(self, value: Any) -> Any:
        return self._gather(value)[0]

    def first(self, value: Any) -> Any:
        return next((one for one in self._gather(value) if one is not None), None)

    def exchange(self, messages: dict[int, list[Any]]) -> list[Any]:
        return [one for told in self._gather(messages) for one in told.get(self.rank, [])]

    def swap(self, outgoing: dict[int, Any], rooms: dict[int, Any]) -> dict[int, Any]:
        told = self._gather(outgoing)
        for rank, room in rooms.items():
            assert rank != self.rank
            room.copy_(told[rank][self.rank])
        return rooms

    def on_all_ranks(self, work: Callable[[], object]) -> None:
        error = None
        try:
            work()
        except CheckpointError as problem:
            error = str(problem)
        error = self.first(error)
        if error is not None:
            raise CheckpointError(error)


def _pieces(draws: random.Random, name: str, tp: int, dp: int, kind: str) -> list[Piece]:
    """A tensor as a layout cuts it: shards, each of which some ranks have ranges of."""
    (_, shape, dim, parts, _) = next(p for p in PARAMETERS if p[0] == name)
    found = []
    for rank in range(tp if dim is not None else 1):
        shard = WeightShard(shape, dim, rank, tp if dim is not None else 1, parts)
        numel = torch.Size(shard.local_shape).numel()
        cuts = sorted(draws.randrange(numel + 1) for _ in range(dp - 1))
        for start, stop in zip([0, *cuts], [*cuts, numel], strict=True):
            found.append(Piece(f"{kind}/{name}", shard, start, stop))
    return found


def _value(piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    whole = torch.arange(torch.Size(piece.shard.global_shape).numel()).view(
        piece.shard.global_shape
    )
    return piece.shard.slice_of(whole).reshape(-1)[slice(*piece.range)].to(dtype)


def _write(root: Path, draws: random.Random, files: int, tp: int, dp: int) -> Path:
    """A checkpoint whose pieces lie in any files."""
    folders: list[Tensors] = [{} for _ in range(files)]
    for name, _, _, _, dtype in PARAMETERS:
        for kind in ("param", "optim"):
            for number, piece in enumerate(_pieces(draws, name, tp, dp, kind)):
                value = _value(piece, dtype)
                draws.choice(folders)[f"{piece.key}/{number}"] = (piece, value)
        whole = Piece(f"sparsity/{name}/counters", WeightShard((3,)))
        draws.choice(folders)[whole.key] = (whole, torch.tensor([1, 2, len(name)]))
    temporary = root / "step-00000001.tmp-ab"
    temporary.mkdir(parents=True)
    records: dict[str, Any] = {}
    for rank, tensors in enumerate(folders):
        records |= write_rank_file(temporary, rank, tensors, {"run_id": "ab", "step": 1})
    publish(temporary, root / "step-00000001", records, {**META, "run_id": "ab", "step": 1})
    return root / "step-00000001"


def _on_threads(world: int, work: Callable[[Any], Any]) -> list[Any]:
    controls, results = Threads(world), [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(controls.of(rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("seed", range(12))
def test_each_gets_its_part_and_files_are_opened_by_one_or_two(tmp_path, monkeypatch, seed):
    draws = random.Random(seed)
    world, files = draws.randrange(1, 6), draws.randrange(1, 9)
    folder = _write(tmp_path, draws, files, draws.choice([1, 2]), draws.randrange(1, 4))
    tp = draws.choice([1, 2, 3, 4])
    wanted: list[list[Piece]] = [[] for _ in range(world)]
    for name, *_ in PARAMETERS:
        for kind in ("param", "optim"):
            for piece in _pieces(draws, name, tp if name != "layer.fc1" else 4, 3, kind):
                draws.choice(wanted).append(piece)
    opened: list[str] = []
    real = TensorFile.__init__

    def noted(self: Any, path: Path) -> None:
        opened.append(path.name)
        real(self, path)

    monkeypatch.setattr(TensorFile, "__init__", noted)

    def work(control: Any) -> dict[str, torch.Tensor]:
        reader = SharedReader(open_together(folder, control), control)
        asks = {name: Ask(all=control.rank == 0) for name, *_ in PARAMETERS}
        for piece in wanted[control.rank]:
            asks[piece.key.split("/")[1]].parts.append(piece)
        reader.look_up(asks)
        found = {str(piece): reader.read_part(piece) for piece in wanted[control.rank]}
        for name, *_ in PARAMETERS:
            key = f"sparsity/{name}/counters"
            assert (key in reader) == (control.rank == 0)
            assert f"param/{name}" in reader
            if control.rank == 0:
                assert reader.keys_beside(key, f"sparsity/{name}/") == [key]
                found[key] = reader.read(key)
        reader.fetch()
        return found

    results = _on_threads(world, work)
    assert len(opened) <= files + world - 1
    dtypes = {name: dtype for name, *_, dtype in PARAMETERS}
    for rank, result in enumerate(results):
        assert isinstance(result, dict), result
        for piece in wanted[rank]:
            expected = _value(piece, dtypes[piece.key.split("/")[1]])
            assert torch.equal(result[str(piece)], expected), piece
    for name, *_ in PARAMETERS:
        assert results[0][f"sparsity/{name}/counters"].tolist() == [1, 2, len(name)]


def test_what_is_missing_or_of_another_shape_is_said(tmp_path):
    folder = _write(tmp_path, random.Random(0), 3, 2, 2)

    def work(control: Any) -> list[str]:
        reader = SharedReader(open_together(folder, control), control)
        whole, other = WeightShard((24, 8)), WeightShard((24, 9))
        parts = [Piece("", whole), Piece("", other)]
        reader.look_up({"layer.qkv": Ask(parts), "no.such": Ask(parts)})
        errors = []
        for piece in (Piece("param/no.such", whole), Piece("param/layer.qkv", other)):
            assert (piece.key in reader) == ("no.such" not in piece.key)
            with pytest.raises(CheckpointError) as error:
                reader.read_part(piece)
            errors.append(str(error.value))
        return errors

    for result in _on_threads(2, work):
        assert result == [
            f"{folder}: holds no tensor 'param/no.such'",
            f"{folder}: param/layer.qkv has shape (24, 8), expected (24, 9)",
        ]


def test_a_file_that_is_lost_meanwhile_is_an_error_on_all_ranks(tmp_path):
    folder = _write(tmp_path, random.Random(0), 2, 1, 1)

    def work(control: Any) -> None:
        opened = open_together(folder, control)
        reader = SharedReader(opened, control)
        reader.look_up({"layer.qkv": Ask([Piece("", WeightShard((24, 8)))])})
        reader.read_part(Piece("param/layer.qkv", WeightShard((24, 8))))
        opened.close()
        control.broadcast(None)
        for path in folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)
        reader.fetch()

    for result in _on_threads(3, work):
        assert isinstance(result, CheckpointError) and "safetensors: missing" in str(result)


def _alone(sizes: list[int], world: int) -> SharedReader:
    """A reader of files of these sizes, of which nothing is read."""
    meta = {"files": {str(n): {"size": size} for n, size in enumerate(sizes)}}
    reader: Any = SimpleNamespace(folder="there", meta=meta)
    return SharedReader(reader, SimpleNamespace(world=world))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_a_value_is_read_by_the_rank_in_whose_share_it_begins(world, dtype):
    draws = random.Random(world)
    width = dtype.itemsize
    for _ in range(40):
        sizes = [draws.randrange(60) for _ in range(draws.randrange(1, 5))]
        total = sum(sizes)
        begin = draws.randrange(total + 1)
        count = draws.randrange((total - begin) // width + 1)
        piece = Piece("k", WeightShard((count,)))
        found = list(_alone(sizes, world)._shares(_Place(piece, 0, "e", begin, dtype)))
        owner = {n: rank for rank, low, high in found for n in range(low, high)}
        assert sum(high - low for _, low, high in found) == len(owner) == count
        assert all(low < high for _, low, high in found)
        for n, rank in owner.items():
            assert total * rank // world <= begin + n * width < total * (rank + 1) // world


def _stored(*pieces: Piece) -> _Stored:
    return _Stored([_Place(p, 0, str(n), 0, torch.uint8) for n, p in enumerate(pieces)])


def test_an_answer_has_what_meets_a_part_and_of_every_tensor_one_piece_at_least():
    whole = WeightShard((4, 6))
    thirds = [Piece("param/w", whole, n, n + 8) for n in (16, 0, 8)]  # in any order
    extra = Piece("sparsity/w/mask", WeightShard((2,)))
    stored = _stored(*thirds, extra)

    def answer(*parts: Piece, everything: bool = False) -> list[str]:
        return [place.entry for place in stored.answer(list(parts), everything)]

    assert answer(Piece("", whole, 7, 9)) == ["1", "2"]
    assert answer(Piece("", whole, 8, 16)) == ["2"]
    assert answer(Piece("", whole)) == ["1", "2", "0"]
    # Its dtype and shape are to be known, whatever is wanted of it.
    for nothing in ((), (Piece("", whole, 9, 9),), (Piece("", WeightShard((6, 4))),)):
        assert answer(*nothing) == ["1"]
    assert answer(everything=True) == ["1", "3"]


def test_pieces_that_make_no_part_up_or_differ_in_type_are_refused():
    reader, whole = _alone([64], 1), WeightShard((4, 6))
    places = [_Place(Piece("param/w", whole, n, n + 8), 0, str(n), n, torch.uint8) for n in (0, 16)]
    reader._places = {"param/w": places}
    assert reader.is_likely("param/w") and not reader.is_likely("param/v")
    assert reader.shape("param/w") == (4, 6)
    with pytest.raises(CheckpointError, match="its pieces hold 16 of 24 values"):
        reader.read("param/w")
    places.append(_Place(Piece("param/w", whole, 8, 16), 0, "8", 8, torch.int8))
    with pytest.raises(CheckpointError, match="its pieces disagree on the type"):
        reader.read("param/w")
