"""Reading a checkpoint of another layout: all ranks together, each file opened by one or two.

A rank of another layout needs parts of many files. So the files, laid end to end, are cut into
equal shares of bytes: a rank reads what is wanted of its share, and sends it to those that want it.
Where parts lie is found without anyone knowing all of it: for each parameter one rank, chosen by
its name, hears of all stored pieces, from the ranks that have verified the files, and of all parts
that are wanted, and answers with the pieces that these may be made of.

    look_up     which pieces are there (`meet`: the ranks chosen by name)
    read_part   notes what is wanted of which share; memory for it, still empty
    fetch       reads and sends; the memory is filled
"""

from __future__ import annotations

import itertools
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from megasparse.checkpoint.pieces import Piece, Run, common, may_meet, require_cover, span
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import DTYPES

_DTYPES = {text: dtype for dtype, text in DTYPES.items()}
Record = list[Any]


@dataclass
class Ask:
    """What a rank wants to know of the tensors of one parameter.

    Attributes:
        parts: pieces that are wanted of the tensors of its shape, `param/` and `optim/`.
        all: all other tensors too, whole.
    """

    parts: list[Piece] = field(default_factory=list)
    all: bool = False


@dataclass(frozen=True)
class _Place:
    """A stored piece, and where it lies.

    Attributes:
        file: number of the file.
        entry: its name there.
        begin: bytes before its values, in all files laid end to end.
    """

    piece: Piece
    file: int
    entry: str
    begin: int
    dtype: torch.dtype

    def to_json(self) -> Record:
        name = DTYPES[self.dtype]
        return [self.piece.key, *_to_json(self.piece), self.file, self.entry, self.begin, name]

    @classmethod
    def of(cls, record: Record) -> _Place:
        key, shard, start, stop, file, entry, begin, dtype = record
        return cls(_piece(key, shard, start, stop), file, entry, begin, _DTYPES[dtype])


@dataclass
class _Request:
    """Values `low` to `high` of an entry, as far as they are of the wanted piece."""

    place: _Place
    wanted: Piece
    low: int
    high: int
    target: torch.Tensor | None = None  # of the rank that wants them

    def runs(self) -> Iterator[Run]:
        """The same, in the same order, on both sides."""
        for run in common(self.wanted, self.place.piece):
            begin, end = max(run.stored, self.low), min(run.stored + run.length, self.high)
            if begin < end:
                yield Run(run.wanted + begin - run.stored, begin, end - begin)

    @property
    def nbytes(self) -> int:
        return sum(run.length for run in self.runs()) * self.place.dtype.itemsize


class SharedReader:
    """A checkpoint that `open_together` has verified; reading as `CheckpointReader`, but later.

    Args:
        reader: of the checkpoint.
        control: of all ranks; `look_up` and `fetch` are collective calls.
    """

    def __init__(self, reader: CheckpointReader, control: ControlPlane) -> None:
        self.folder, self.meta = reader.folder, reader.meta
        self._reader, self._control = reader, control
        sizes = [entry["size"] for entry in self.meta["files"].values()]
        self._begins = [0, *itertools.accumulate(sizes)]
        total, world = self._begins[-1], control.world
        self._bounds = [*(total * rank // world for rank in range(world)), total]  # of the shares
        self._places: dict[str, list[_Place]] = {}
        self._requests: dict[int, list[_Request]] = {}

    def look_up(self, asks: dict[str, Ask]) -> None:
        """Find out where tensors lie.

        Args:
            asks: by the parameter's name; nothing else can be read afterwards.
        """
        world = self._control.world
        told: dict[int, list[Any]] = {}
        for number, name in enumerate(self._reader.files):
            if name not in self._reader.verified:
                continue
            file = self._reader.file(name)
            for stored in file.pieces:
                begin = self._begins[number] + file.place(stored)
                place = _Place(stored.piece, number, stored.entry, begin, file.dtype(stored))
                told.setdefault(_meeting(stored.piece.key, world), []).append(place.to_json())
        for name, ask in asks.items():
            parts = [_to_json(part) for part in ask.parts]
            mine = {"name": name, "parts": parts, "all": ask.all, "rank": self._control.rank}
            told.setdefault(_meeting(f"param/{name}", world), []).append(mine)
        heard = self._control.exchange(told)
        places: dict[str, list[_Place]] = {}
        for record in (one for one in heard if isinstance(one, list)):
            place = _Place.of(record)
            places.setdefault(_name(place.piece.key), []).append(place)
        pieces = {name: _Stored(found) for name, found in places.items()}
        answers: dict[int, list[Any]] = {}
        for asked in (one for one in heard if isinstance(one, dict)):
            wanted = [_piece("", *part) for part in asked["parts"]]
            name = asked["name"]
            found = pieces[name].answer(wanted, asked["all"]) if name in pieces else []
            answers.setdefault(asked["rank"], []).extend(place.to_json() for place in found)
        for record in self._control.exchange(answers):
            place = _Place.of(record)
            self._places.setdefault(place.piece.key, []).append(place)

    def keys_beside(self, key: str, prefix: str) -> list[str]:
        """Keys that start with `prefix`."""
        return [other for other in self._places if other.startswith(prefix)]

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def is_likely(self, key: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return key in self

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor.

        Raises:
            CheckpointError: no such tensor.
        """
        return self._require(key)[0].piece.shard.global_shape

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, once `fetch` has filled it."""
        return self.read_part(Piece(key, WeightShard(self.shape(key)))).view(self.shape(key))

    def read_part(self, wanted: Piece) -> torch.Tensor:
        """A part of a tensor, 1-D, on the CPU, once `fetch` has filled it.

        Raises:
            CheckpointError: no such tensor, of another shape, or the pieces do not make the part
                up.
        """
        places = self._require(wanted.key)
        target = torch.empty(wanted.numel, dtype=places[0].dtype)
        found: list[tuple[int, int]] = []
        for place in places:
            if place.piece.shard.global_shape != wanted.shard.global_shape:
                raise CheckpointError(
                    f"{self.folder}: {wanted.key} has shape {place.piece.shard.global_shape}, "
                    f"expected {wanted.shard.global_shape}"
                )
            if place.dtype != target.dtype:
                raise CheckpointError(
                    f"{self.folder}: {wanted.key}: its pieces disagree on the type"
                )
            for rank, low, high in self._shares(place):
                request = _Request(place, wanted, low, high, target)
                runs = [(run.wanted, run.length) for run in request.runs()]
                if runs:
                    self._requests.setdefault(rank, []).append(request)
                found += runs
        require_cover(found, wanted, str(self.folder))
        return target

    def fetch(self) -> None:
        """Fill all parts that were asked for.

        Raises:
            CheckpointError: on all ranks: a file cannot be read any more.
        """
        control = self._control
        messages = {
            rank: [[control.rank, [_request_json(request) for request in requests]]]
            for rank, requests in self._requests.items()
        }
        outgoing: dict[int, torch.Tensor] = {}

        def read(asked: list[Any]) -> None:
            known: dict[str, torch.Tensor] = {}  # replicated values are wanted more than once
            for rank, requests in asked:
                parts = [self._values(request, known) for request in requests]
                outgoing[rank] = torch.cat(parts)

        asked = control.exchange(messages)
        control.on_all_ranks(lambda: read(asked))
        rooms = {
            rank: torch.empty(sum(request.nbytes for request in requests), dtype=torch.uint8)
            for rank, requests in self._requests.items()
            if rank != control.rank
        }
        own = outgoing.pop(control.rank, None)
        come = control.swap(outgoing, rooms)
        if own is not None:
            come[control.rank] = own
        for rank, content in come.items():
            _scatter(self._requests[rank], content)
        self._requests.clear()

    def _values(self, request: list[Any], known: dict[str, torch.Tensor]) -> torch.Tensor:
        """What was asked for of this rank's share, as bytes."""
        place, *rest = request
        name = str(request)
        if name not in known:
            one = _Request(_Place.of(place), _piece("", *rest[:3]), *rest[3:])
            file = self._reader.file(self._reader.files[one.place.file])
            known[name] = torch.cat(
                [
                    file.read_values(one.place.entry, run.stored, run.stored + run.length)
                    for run in one.runs()
                ]
            ).view(torch.uint8)
        return known[name]

    def _shares(self, place: _Place) -> Iterator[tuple[int, int, int]]:
        """The ranks that read a piece, and which of its values each."""
        bounds, width = self._bounds, place.dtype.itemsize
        begin, end = place.begin, place.begin + place.piece.numel * width
        rank = bisect_right(bounds, begin) - 1
        while bounds[rank] < end:
            # A value belongs to the share in which it begins.
            low = max(0, -(-(bounds[rank] - begin) // width))
            high = min(place.piece.numel, -(-(bounds[rank + 1] - begin) // width))
            if low < high:
                yield rank, low, high
            rank += 1

    def _require(self, key: str) -> list[_Place]:
        if key not in self._places:
            raise CheckpointError(f"{self.folder}: holds no tensor {key!r}")
        return self._places[key]


class _Stored:
    """The stored pieces of one parameter, by tensor, in order of where they begin."""

    def __init__(self, places: list[_Place]) -> None:
        self._keys: dict[str, list[tuple[int, int, _Place]]] = {}
        for place in places:
            begin, end = span(place.piece) if place.piece.numel else (0, -1)
            self._keys.setdefault(place.piece.key, []).append((begin, end, place))
        for found in self._keys.values():
            found.sort(key=lambda one: one[:2])
        # How far the pieces up to each one reach.
        self._reach = {
            key: list(itertools.accumulate((end for _, end, _ in found), max))
            for key, found in self._keys.items()
        }

    def answer(self, parts: list[Piece], everything: bool) -> list[_Place]:
        """The pieces that an ask is about; of each tensor like the parameter at least one."""
        answer = []
        for key, found in self._keys.items():
            if not key.startswith(("param/", "optim/")):
                answer += [place for _, _, place in found] if everything else []
                continue
            shape = found[0][2].piece.shard.global_shape
            fitting = [part for part in parts if part.shard.global_shape == shape and part.numel]
            numbers = {n for part in fitting for n in self._meeting(key, part)}
            answer += [found[number][2] for number in sorted(numbers or {0})]
        return answer

    def _meeting(self, key: str, part: Piece) -> Iterator[int]:
        """Numbers of the pieces of a tensor that may share entries with a part."""
        found, reach = self._keys[key], self._reach[key]
        first, last = span(part)
        number = bisect_right(found, last, key=lambda one: one[0]) - 1
        while number >= 0 and reach[number] >= first:
            if may_meet(part, found[number][2].piece):
                yield number
            number -= 1


def _scatter(requests: list[_Request], content: torch.Tensor) -> None:
    """Bytes that a rank has sent, into the memory of the parts."""
    position = 0
    for request in requests:
        length = request.nbytes
        values = content[position : position + length].clone().view(request.place.dtype)
        position, at = position + length, 0
        assert request.target is not None
        for run in request.runs():
            request.target[run.wanted : run.wanted + run.length] = values[at : at + run.length]
            at += run.length


def _name(key: str) -> str:
    """The parameter that a tensor is of: `param/NAME`, `optim/NAME/exp_avg`."""
    return key.split("/")[1] if "/" in key else key


def _meeting(key: str, world: int) -> int:
    """The rank that hears of all pieces of a parameter and of all that want some."""
    return zlib.crc32(_name(key).encode()) % world


def _to_json(piece: Piece) -> list[Any]:
    return [list(asdict(piece.shard).values()), piece.start, piece.stop]


def _piece(key: str, shard: list[Any], start: int | None, stop: int | None) -> Piece:
    shape, *rest = shard
    return Piece(key, WeightShard(tuple(shape), *rest), start, stop)


def _request_json(request: _Request) -> list[Any]:
    place, wanted = request.place.to_json(), _to_json(request.wanted)
    return [place, *wanted, request.low, request.high]
