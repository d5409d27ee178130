"""A save's bounds and defaults, and what readers of a folder ask of it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from megasparse.checkpoint import directory
from megasparse.checkpoint import saver as module
from megasparse.checkpoint.pieces import Piece, Stored, common, may_meet, require_cover
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import Saver, choose_and_tell
from megasparse.checkpoint.writer import write_rank_file
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError, StorageError
from megasparse.sparsity.shard import WeightShard
from tests.checkpoint.saves import META, tensors_of, write_checkpoint

ALONE = ControlPlane(None)


def test_a_saver_keeps_two_in_the_foreground_and_forgives_nothing(tmp_path):
    saver = Saver(tmp_path, ALONE, "ab")
    assert saver.saved_step is None and not saver.pending and not saver.writing
    for step in (1, 2, 3):
        saver.save(step, tensors_of(step), META)
        assert not saver.pending and saver.saved_step == step
    saver.finish()
    assert directory.list_steps(tmp_path) == [3, 2]
    saver._hook = lambda point: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises((StorageError, OSError)):
        saver.save(4, tensors_of(4), META)


def test_every_zeroth_interval_keeps_all(tmp_path):
    saver = Saver(tmp_path, ALONE, "ab", keep_last=0)
    for step in range(4):
        saver.save(step, tensors_of(step), META)
    saver.finish()
    assert directory.list_steps(tmp_path) == [3, 2, 1, 0]


def test_a_failure_in_a_row_is_forgotten_after_a_save(tmp_path):
    fails = [False]

    def hook(point: str) -> None:
        if fails[0] and point == "save:sync":
            raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, ALONE, "ab", max_failed_saves=1, hook=hook)
    for step, failing in enumerate([True, False, True, False, True], 1):
        fails[0] = failing
        saver.save(step, tensors_of(step), META)
        assert saver._failures == failing
    with pytest.raises(StorageError):
        saver.save(6, tensors_of(6), META)


def test_room_is_asked_for_with_some_to_spare_in_a_private_folder(tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(module, "check_free_space", lambda _, needed, *__: asked.append(needed))
    modes: list[int] = []

    def hook(point: str) -> None:
        if point == "save:sync":
            (folder,) = tmp_path.glob("*.tmp-ab")
            modes.append(folder.stat().st_mode & 0o777)

    saver = Saver(tmp_path, ALONE, "ab", hook=hook)
    saver.save(1, tensors_of(1), META)
    size = 40 * 30 * (4 + 2 + 1)
    assert asked == [size + size // 50 + 65536] and modes == [0o700]


def test_four_ranks_that_failed_are_named_and_the_others_counted(tmp_path):
    saver = Saver(tmp_path, ALONE, "ab")

    def told(count: int) -> str:
        job = saver._begin(1, {}, META)
        answers: list[dict[str, Any]] = [{"error": f"full {n}"} for n in range(count)]
        saver._publish(job, [{"files": {}}, *answers])
        assert isinstance(job.failure, StorageError) and not job.temporary.exists()
        return str(job.failure)

    assert told(1).endswith(": rank 1: full 0")
    assert told(4).endswith("rank 4: full 3") and told(5).endswith("full 3; and 1 more ranks")
    assert directory.list_steps(tmp_path) == []


def test_a_save_passes_its_points_in_order_and_over_what_is_in_its_way(tmp_path):
    points: list[str] = []
    root = tmp_path / "root"  # is made anew
    saver = Saver(root, ALONE, "ab", hook=points.append)
    saver.save(1, tensors_of(1), META)
    saver.finish()
    assert points == [
        "save:begin",
        "save:file",
        "save:file",
        "save:file",
        "save:sync",
        "save:manifest",
        "save:rename",
        "save:pointer",
        "save:prune",
    ]
    (root / "step-00000002.tmp-ab" / "left").mkdir(parents=True)  # by a save that failed
    saver.save(2, tensors_of(2), META)
    saver.finish()
    assert directory.list_steps(root) == [2, 1]


def test_a_save_goes_on_in_the_background_step_by_step(tmp_path):
    def hook(point: str) -> None:
        if point == "save:prune":
            time.sleep(0.05)  # who waits for the end waits for this too

    saver = Saver(tmp_path, ALONE, "ab", keep_last=1, async_save=True, hook=hook)
    saver.advance()  # nothing to do
    for step in (1, 2):
        saver.save(step, tensors_of(step), META)
        job: Any = saver._job
        writes = job.thread
        assert writes.daemon and saver.saved_step == (None if step == 1 else 1)
        writes.join()
        assert directory.list_steps(tmp_path) == [1][: step - 1]
        saver.advance()  # all files are there: published by a thread of its own
        publishes = job.thread
        assert saver.pending and publishes is not writes and publishes.daemon
        publishes.join()
        assert directory.read_pointer(tmp_path) == step and saver.saved_step != step
        saver.advance()
        assert not saver.pending and saver.saved_step == step
        pruner: Any = saver._pruner
        assert pruner.daemon
        saver.finish()
        assert not pruner.is_alive() and directory.list_steps(tmp_path) == [step]


def test_a_failure_in_the_background_is_forgiven_unless_it_is_the_end(tmp_path, caplog):
    def hook(point: str) -> None:
        if point == "save:sync":
            raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, ALONE, "ab", async_save=True, max_failed_saves=5, hook=hook)
    saver.save(1, tensors_of(1), META)
    with caplog.at_level("WARNING"):
        saver.finish()
    assert "save failed (1 in a row), training goes on" in caplog.text
    saver.save(2, tensors_of(2), META)
    with pytest.raises(StorageError):
        saver.finish(final=True)
    with pytest.raises(StorageError):
        saver.save(3, tensors_of(3), META, final=True)


@pytest.mark.parametrize(("sizes", "world"), [([1, 1, 9000], 3), ([9000, 1], 2)])
def test_with_as_many_ranks_as_files_each_looks_at_its_own(tmp_path, sizes, world):
    files: dict[str, Any] = {}
    for rank, size in enumerate(sizes):
        values = torch.zeros(size, dtype=torch.uint8)
        tensors = {"w": (Piece(f"w{rank}", WeightShard((size,))), values)}
        files |= write_rank_file(tmp_path, rank, tensors, {"run_id": "ab", "step": 1})
    reader = CheckpointReader.of_files(tmp_path, files)
    assert [reader.share(rank, world) for rank in range(world)] == [[name] for name in files]
    for others in (1, 2, 5):
        shares = [reader.share(rank, others) for rank in range(others)]
        assert sum(shares, []) == list(files)
    # Those that were told to be likely are looked into, and no others.
    reader.search_first([[list(files)[1]], ["rank-00099.safetensors"]])
    assert reader.is_likely("w1") and not reader.is_likely("w0")
    assert list(reader._known) == [list(files)[1]]
    assert reader.keys_beside("w0", "w") == [f"w{n}" for n in (1, 0, *range(2, world))]
    assert len(reader._pieces["w1"]) == 1  # a file is searched once
    told: list[int] = []
    reader.file(list(files)[0]).verify(told.append)
    assert told == [sizes[0]]


@pytest.mark.parametrize("kind", ["copy", "pointer", "foreign", "none"])
def test_a_warning_says_what_is_odd_and_nothing_says_nothing(tmp_path, caplog, kind):
    write_checkpoint(tmp_path, 1, run_id="a" * 32)
    write_checkpoint(tmp_path, 2, run_id="a" * 32)
    if kind == "copy":
        (tmp_path / "step-00000002").rename(tmp_path / "step-00000007")
    directory.write_pointer(tmp_path, 1 if kind == "pointer" else 2, "a" * 16)
    if kind == "foreign":
        write_checkpoint(tmp_path, 3, run_id="b" * 32)
        directory.write_pointer(tmp_path, 2, "a" * 16)
    with caplog.at_level("WARNING"):
        reader, damaged = choose_and_tell(tmp_path, ALONE)
    assert reader is not None and reader.meta["step"] == 2 and damaged == []
    words = {"copy": "holds step 2", "pointer": "does not name step 2", "foreign": "passed over"}
    assert len(caplog.records) == (kind != "none") and words.get(kind, "") in caplog.text


def test_each_file_is_looked_through_once_and_what_is_damaged_is_told(tmp_path, caplog):
    folders = [write_checkpoint(tmp_path, step) for step in (1, 2)]
    reader = module.open_together(folders[0], ALONE)
    assert reader.verified == reader.files and len(reader.files) == 2
    path = folders[1] / reader.files[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with caplog.at_level("WARNING"):
        found, damaged = choose_and_tell(tmp_path, ALONE)
    assert found is not None and found.meta["step"] == 1 and damaged == [folders[1]]
    assert "wrong sha256; trying the checkpoint before it" in caplog.text


def test_a_link_in_place_of_a_checkpoint_is_none(tmp_path):
    folder = write_checkpoint(tmp_path / "real", 1)
    (tmp_path / "step-00000001").symlink_to(folder)
    for opened in (
        lambda: module.open_together(tmp_path / "step-00000001", ALONE),
        lambda: CheckpointReader(tmp_path / "step-00000001"),
    ):
        with pytest.raises(CheckpointError, match="found a link, expected a folder"):
            opened()


def _again(piece: Piece) -> Any:
    """The record of a piece, as a file has it."""
    return json.loads(json.dumps(piece.to_json("e", "")))


def test_pieces_that_touch_share_nothing():
    row, column = WeightShard((8, 6)), [WeightShard((8, 6), 1, rank, 2) for rank in range(2)]
    first, second = Piece("k", row, 0, 5), Piece("k", row, 5, 9)
    assert not list(common(first, second)) and not may_meet(first, second)
    empty = Piece("k", row, 5, 5)
    assert not list(common(empty, first)) and not list(common(first, empty))
    assert not may_meet(empty, second) and not may_meet(second, empty)
    inside = Piece("k", row, 7, 7)
    assert not may_meet(inside, second) and not may_meet(second, inside)
    for one, other in ((column[0], column[1]), (column[1], column[0])):
        assert not may_meet(Piece("k", one), Piece("k", other))
        assert not list(common(Piece("k", one), Piece("k", other)))
    assert may_meet(Piece("k", column[0]), Piece("k", row, 6, 7))  # whose rows are whole


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"start": 0, "stop": 24}, True),
        ({"start": 24, "stop": 24}, True),
        ({"start": 0, "stop": 25}, False),
        ({"start": 3, "stop": 2}, False),
        ({"start": 0}, False),
        ({"stop": 3}, False),
        ({"start": 0, "stop": True}, False),
        ({"start": -1, "stop": 3}, False),
    ],
)
def test_a_range_lies_within_its_shard(change, holds):
    shard = {"global_shape": [4, 6], "rank": 0, "world": 1, "parts": 1}
    record = {"entry": "e", "key": "k", "shard": shard, "sha256": "", **change}
    if not holds:
        with pytest.raises(CheckpointError, match="of 24"):
            Stored.of(record, "here")
        return
    piece = Stored.of(record, "here").piece
    assert piece.shard == WeightShard((4, 6)) and piece.range == (
        change.get("start", 0),
        change.get("stop", 24),
    )
    assert ("start" in _again(piece)) == ("start" in change)
    assert Stored.of(_again(piece), "here").piece == piece


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({"global_shape": [0, 6]}, True),
        ({"global_shape": []}, True),
        ({"dim": 1}, True),
        ({"dim": 0, "rank": 1, "world": 2}, True),
        ({"block": 1, "blocks": 2}, True),
        ({"global_shape": [], "blocks": 2}, False),
        ({"block": 2, "blocks": 2}, False),
        ({"block": -1, "blocks": 2}, False),
        ({"block": 0, "blocks": 0}, False),
        ({"blocks": True}, False),
        ({"block": "0"}, False),
        ({"blocks": 3}, False),
        ({"dim": 0, "world": 3}, False),
        ({"global_shape": [], "dim": 0}, False),
    ],
)
def test_a_shard_is_a_part_of_a_tensor(change, holds):
    shard = {"global_shape": [4, 6], "rank": 0, "world": 1, "parts": 1, **change}
    record = {"entry": "e", "key": "k", "shard": shard, "sha256": ""}
    if not holds:
        with pytest.raises(CheckpointError, match="here: k"):
            Stored.of(record, "here")
        return
    piece = Stored.of(record, "here").piece
    assert Stored.of(_again(piece), "here").piece == piece
    for name in ("global_shape", "dim", "rank", "world", "parts", "block", "blocks"):
        if name in change:
            found = getattr(piece.shard, name)
            assert (list(found) if name == "global_shape" else found) == change[name]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([(0, 4), (4, 6)], None),
        ([(4, 6), (0, 4)], None),
        ([(0, 10)], None),
        ([(0, 4), (5, 5)], "hold 9 of 10 values$"),
        ([], "hold 0 of 10 values$"),
        ([(0, 10), (3, 1)], "hold 11 of 10 values, some of them twice"),
        ([(0, 4), (3, 6)], "hold 10 of 10 values, some of them twice"),
    ],
)
def test_runs_make_up_a_piece_each_entry_once(found, words):
    wanted = Piece("k", WeightShard((10,)))
    if words is None:
        require_cover(found, wanted, "here")
        return
    with pytest.raises(CheckpointError, match=words):
        require_cover(found, wanted, "here")
