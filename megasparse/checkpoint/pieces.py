"""Pieces of tensors: which part of a whole one is, and where two parts meet.

A tensor-parallel shard is a part of the whole along one dimension, or of a block of the whole (the
experts of a rank); a piece is a range of a shard's
flattened entries (all of it, or what one data-parallel rank holds). `common` finds what a stored
piece and a wanted one share, as runs of entries that follow each other in both.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from megasparse.checkpoint.manifest import check_fields
from megasparse.errors import CheckpointError, ConfigError
from megasparse.sparsity.shard import ShardSlice, WeightShard

_PIECE: dict[str, type] = {"entry": str, "key": str, "shard": dict, "sha256": str}
_SHARD: dict[str, type] = {"global_shape": list, "rank": int, "world": int, "parts": int}


@dataclass(frozen=True)
class Piece:
    """A tensor, or a part of one.

    Attributes:
        key: name of the whole tensor.
        shard: tensor-parallel part.
        start, stop: range of the flattened part (ZeRO); None: all of it.
    """

    key: str
    shard: WeightShard
    start: int | None = None
    stop: int | None = None

    @property
    def range(self) -> tuple[int, int]:
        """Start and stop of the range, whole shards too."""
        if self.start is None or self.stop is None:
            return 0, math.prod(self.shard.local_shape)
        return self.start, self.stop

    @property
    def numel(self) -> int:
        """Entries of the piece."""
        start, stop = self.range
        return stop - start

    def to_json(self, entry: str, sha256: str) -> dict[str, Any]:
        """The record of the piece, stored under the name `entry`."""
        shard = {k: v for k, v in asdict(self.shard).items() if k != "dim" or v is not None}
        if self.shard.blocks == 1:
            del shard["block"], shard["blocks"]
        record = {"entry": entry, "key": self.key, "shard": shard, "sha256": sha256}
        return record if self.start is None else {**record, "start": self.start, "stop": self.stop}


@dataclass(frozen=True)
class Stored:
    """A piece in a file: the name of its entry, and the digest of its values."""

    piece: Piece
    entry: str
    sha256: str

    @classmethod
    def of(cls, record: Any, where: str) -> Stored:
        """A record, every field checked.

        Raises:
            CheckpointError: names `where`, and what was found and expected.
        """
        check_fields(record, _PIECE, f"{where}: a piece")
        key = record["key"]
        check_fields(record["shard"], _SHARD, f"{where}: {key}")
        shard = _shard_of(record["shard"], f"{where}: {key}")
        bounds = record.get("start"), record.get("stop")
        if bounds != (None, None):
            start, stop = bounds
            whole = math.prod(shard.local_shape)
            if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= whole:
                raise CheckpointError(f"{where}: {key}: entries {start} to {stop} of {whole}")
        return cls(Piece(key, shard, *bounds), record["entry"], record["sha256"])


def _shard_of(record: dict[str, Any], where: str) -> WeightShard:
    shape = record["global_shape"]
    dim, world = record.get("dim"), record["world"]
    block, blocks = record.get("block", 0), record.get("blocks", 1)
    if (
        any(type(size) is not int or size < 0 for size in shape)
        or not (dim is None or (type(dim) is int and 0 <= dim < len(shape)))
        or not 0 <= record["rank"] < world
        or record["parts"] < 1
        or type(block) is not int
        or type(blocks) is not int
        or not 0 <= block < blocks
        or (blocks > 1 and not shape)
    ):
        raise CheckpointError(f"{where}: no part of a tensor: {record}")
    try:
        return WeightShard(tuple(shape), dim, record["rank"], world, record["parts"], block, blocks)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Run:
    """`length` entries that follow each other in two pieces, from these positions on."""

    wanted: int
    stored: int
    length: int


def common(wanted: Piece, stored: Piece) -> Iterator[Run]:
    """What two pieces of one whole tensor share; positions count from the pieces' own starts."""
    (first, last), (begin, end) = wanted.range, stored.range
    if wanted.shard == stored.shard:
        start, stop = max(first, begin), min(last, end)
        if start < stop:
            yield Run(start - first, start - begin, stop - start)
        return
    theirs = list(_runs(stored.shard, begin, end))
    if not theirs:
        return
    places = [place for _, place, _ in theirs]
    span = places[0], theirs[-1][1] + theirs[-1][2]
    for local, place, length in _runs(wanted.shard, first, last, span):
        number = max(bisect_right(places, place) - 1, 0)
        while number < len(theirs) and places[number] < place + length:
            other_local, other, other_length = theirs[number]
            start, stop = max(place, other), min(place + length, other + other_length)
            if start < stop:
                ours = local + start - place - first
                yield Run(ours, other_local + start - other - begin, stop - start)
            number += 1


def span(piece: Piece) -> tuple[int, int]:
    """Places of the first and the last entry in the flattened whole; not of an empty piece."""
    start, stop = piece.range
    return _place(piece.shard, start), _place(piece.shard, stop - 1)


def may_meet(one: Piece, other: Piece) -> bool:
    """Whether two pieces of one whole tensor may share entries; in a moment, whatever their size.

    They do not where the places of one in the whole all lie before those of the other, or where
    tensor-parallel shards along one dimension have nothing in common.
    """
    if not one.numel or not other.numel:
        return False
    (first, last), (begin, end) = span(one), span(other)
    if last < begin or end < first:
        return False
    blocks = {(shard.block, shard.blocks) for shard in (one.shard, other.shard)}
    dim = one.shard.dim
    if one.shard == other.shard or dim is None or dim != other.shard.dim or len(blocks) > 1:
        return True
    return any(
        a.global_start < b.global_start + b.length and b.global_start < a.global_start + a.length
        for a in one.shard.slices(dim)
        for b in other.shard.slices(dim)
    )


def _place(shard: WeightShard, position: int) -> int:
    """Where an entry of a flattened shard lies in the flattened whole."""
    base = _base(shard)
    if shard.dim is None:
        return base + position
    inner = math.prod(shard.global_shape[shard.dim + 1 :])
    outer, rest = divmod(position, shard.local_shape[shard.dim] * inner)
    index, column = divmod(rest, inner)
    (part,) = (p for p in _in_block(shard) if 0 <= index - p.local_start < p.length)
    index += part.global_start - part.local_start
    return base + (outer * shard.block_shape[shard.dim] + index) * inner + column


def _base(shard: WeightShard) -> int:
    """Where the shard's block begins in the flattened whole."""
    return shard.block_start * math.prod(shard.global_shape[1:])


def _in_block(shard: WeightShard) -> tuple[ShardSlice, ...]:
    """The slices along the cut dimension, with their places in the block."""
    assert shard.dim is not None
    first = shard.block_start if shard.dim == 0 else 0
    if not first:
        return shard.slices(shard.dim)
    return tuple(
        replace(part, global_start=part.global_start - first) for part in shard.slices(shard.dim)
    )


def require_cover(found: list[tuple[int, int]], wanted: Piece, where: str) -> None:
    """Refuse runs that do not make up a piece, each entry once.

    Args:
        found: start, within the piece, and length of each.

    Raises:
        CheckpointError: says how many there are of how many.
    """
    end, have, twice = 0, 0, ""
    for start, length in sorted(found):
        if start < end:
            twice = ", some of them twice"
        end, have = max(end, start + length), have + length
    if twice or have != wanted.numel:
        raise CheckpointError(
            f"{where}: {wanted.key}: its pieces hold {have} of {wanted.numel} values{twice}"
        )


def _runs(
    shard: WeightShard, start: int, stop: int, span: tuple[int, int] | None = None
) -> Iterator[tuple[int, int, int]]:
    """Entries `start` to `stop` of a flattened shard as (position, place in the whole, length).

    Args:
        span: places in the whole, outside of which nothing is wanted.
    """
    shape, base = shard.block_shape, _base(shard)
    if shard.dim is None:
        if start < stop:
            yield start, base + start, stop - start
        return
    inner = math.prod(shape[shard.dim + 1 :])
    slices = _in_block(shard)
    row = shape[shard.dim] // shard.world * inner  # entries of the shard for each outer index
    if not row:
        return
    first, last = start // row, -(-stop // row)
    if span is not None:
        across = shape[shard.dim] * inner
        first = max(first, (span[0] - base) // across)
        last = min(last, -(-(span[1] - base) // across))
    for outer in range(first, last):
        for part in slices:
            local = outer * row + part.local_start * inner
            begin, end = max(start, local), min(stop, local + part.length * inner)
            if begin < end:
                place = base + outer * shape[shard.dim] * inner + part.global_start * inner
                yield begin, place + begin - local, end - begin


@dataclass(frozen=True)
class Share:
    """Entries `start` to `stop` of an item, which fall to one rank."""

    rank: int
    start: int
    stop: int


def divide(sizes: list[int], world: int) -> list[list[Share]]:
    """Items laid end to end and cut into equal shares: the shares of each item, in order.

    Args:
        sizes: entries of each item.
        world: ranks that share; each gets `total / world` entries, rounded.
    """
    total, begin = sum(sizes), 0
    bounds = [*(total * rank // world for rank in range(world)), total]
    shares: list[list[Share]] = []
    for size in sizes:
        rank, end = bisect_right(bounds, begin) - 1, begin + size
        found = []
        while bounds[rank] < end:
            low, high = max(begin, bounds[rank]), min(end, bounds[rank + 1])
            if low < high:
                found.append(Share(rank, low - begin, high - begin))
            rank += 1
        shares.append(found)
        begin = end
    return shares


def owners(sizes: list[int], world: int) -> list[int]:
    """The rank that each item falls to, when items are not cut."""
    return [shares[0].rank if shares else 0 for shares in divide(sizes, world)]
