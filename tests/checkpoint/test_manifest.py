"""Every field of a manifest is checked; what is too long for readers is never published."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from megasparse.checkpoint import directory, manifest
from megasparse.checkpoint.manifest import MANIFEST, encode_manifest
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import Saver, choose
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError, StorageError
from tests.checkpoint.saves import (
    META,
    check_content,
    rewrite,
    rewrite_pieces,
    tensors_of,
    write_checkpoint,
)

ALONE = ControlPlane(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(surprise=1), r"unknown keys \['surprise'\]"),
        (lambda m: m.pop("step"), "step: found nothing, expected int"),
        (lambda m: m["files"].update({"../evil": {"size": 0, "header_sha256": ""}}), "evil"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 0, "header_sha256": ""}}), "passwd"),
        (lambda m: m["files"].update({"rank-00009.safetensors": {"size": 9, "header_sha256": ""}}),
         "rank-00009.safetensors: missing, expected 9 bytes"),
        (lambda m: m["files"]["rank-00000.safetensors"].update(size="9"), "size: found str"),
    ],
)  # fmt: skip
def test_a_manifest_that_agrees_with_itself_is_still_checked(tmp_path, change, message):
    folder = write_checkpoint(tmp_path, 1)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[0]["shard"].update(global_shape=[1 << 40] * 2), "expected .* values"),
        (lambda p: p[0]["shard"].update(global_shape=[30, 40]), "expected .30, 40."),
        (lambda p: p[0]["shard"].update(global_shape=[-30, -40]), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(global_shape=[30, "40"]), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(global_shape=[30, True]), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(dim=2), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(dim=-1), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(dim="0"), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(rank=2, world=2), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(rank=-1), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(parts=0), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(world=0), "no part of a tensor"),
        (lambda p: p[0]["shard"].update(rank=1), "1200 of 1200 values, some of them twice"),
        (lambda p: p[0].update(start=0, stop=1 << 60), "entries 0 to"),
        (lambda p: p[0].update(start=0, stop=5), "expected 5 values"),
        (lambda p: p[0].update(entry="z"), "holds no tensor 'z'"),
        (lambda p: p[0].update(sha256=5), "sha256: found int, expected str"),
        (lambda p: p.pop(), "its pieces hold 600 of 1200 values"),
    ],
)
def test_a_list_of_pieces_that_agrees_with_its_digest_is_still_checked(tmp_path, change, message):
    folder = write_checkpoint(tmp_path, 1)
    rewrite_pieces(folder, change)
    with pytest.raises(CheckpointError, match=message):
        reader = CheckpointReader(folder)
        for key in list(reader.keys()):
            reader.read(key)


@pytest.mark.parametrize("version", [1, 4, None, "3", True])
def test_other_formats_are_refused(tmp_path, version):
    folder = write_checkpoint(tmp_path, 1)
    content = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps({**content, "format": version}))
    with pytest.raises(CheckpointError, match=f"format {version!r}, expected 3"):
        CheckpointReader(folder)


def test_the_format_before_can_be_read(tmp_path):
    """It listed the pieces of all files in the manifest, and had its digest of indented JSON."""
    folder = write_checkpoint(tmp_path, 1)
    pieces = []
    for name in (manifest.file_name(rank) for rank in range(2)):
        content = (folder / name).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        for piece in json.loads(header["__metadata__"]["pieces"]):
            pieces.append({"start": None, "stop": None, "file": name, **piece})
    body = json.loads((folder / MANIFEST).read_bytes())
    body.pop("sha256")
    body = {**body, "format": 2, "pieces": pieces}
    digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    text = json.dumps({**body, "sha256": digest}, indent=1)
    (folder / MANIFEST).write_text(text)
    reader = CheckpointReader(folder)
    assert reader.keys() == list(tensors_of(1))
    check_content(reader)
    (folder / MANIFEST).write_text(text.replace('"consumed_samples": 0', '"consumed_samples": 1'))
    with pytest.raises(CheckpointError, match="damaged: wrong sha256"):
        CheckpointReader(folder)


def test_its_size_is_a_line_a_file_however_many_pieces_there_are():
    entry = {"size": 10**12, "header_sha256": "0" * 64}

    def size(ranks: int) -> int:
        files = {manifest.file_name(rank): entry for rank in range(ranks)}
        return len(encode_manifest({**META, "run_id": "ab", "step": 1, "files": files}))

    assert size(16_384) - size(0) <= 160 * 16_384


@pytest.mark.parametrize("async_save", [False, True])
def test_what_readers_refuse_is_not_published(tmp_path, monkeypatch, async_save):
    """The save before stays the newest, and is read."""
    saver = Saver(tmp_path, ALONE, "ab", async_save=async_save)
    saver.save(1, tensors_of(1), META)
    saver.finish()
    length = (directory.step_folder(tmp_path, 1) / MANIFEST).stat().st_size
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", length + 10)
    saver.save(2, tensors_of(2), META)  # as long
    saver.finish()
    with pytest.raises(StorageError, match=rf"readers take {length + 10}"):
        saver.save(3, tensors_of(3), {**META, "state": {"longer": "x" * 20}})
        saver.finish()
    monkeypatch.setattr("megasparse.tensor_files.MAX_HEADER_BYTES", 100)
    with pytest.raises(StorageError, match=r"rank 0: 4 entries make a header of \d+ bytes"):
        saver.save(4, tensors_of(4), META)
        saver.finish()
    monkeypatch.undo()
    assert directory.list_steps(tmp_path) == [2, 1]
    check_content(choose(tmp_path, ALONE))


@pytest.mark.parametrize("put", [os.mkfifo, lambda p: os.symlink("/dev/zero", p)])
def test_pipes_and_devices_in_place_of_files_are_not_waited_for(tmp_path, put):
    """A pointer is a hint; a checkpoint without a manifest is none."""
    for step in (1, 2):
        newest = write_checkpoint(tmp_path, step)
    for name in (directory.POINTER, f"{newest.name}/{MANIFEST}"):
        (tmp_path / name).unlink()
        put(tmp_path / name)
        reader = choose(tmp_path, ALONE)
        assert reader is not None and reader.meta["step"] == (2 if "/" not in name else 1)


def test_a_message_shows_the_begin_of_what_is_odd(tmp_path):
    path = write_checkpoint(tmp_path, 1) / MANIFEST
    for odd in ({"format": "x" * 5000}, {"format": [[0] * 5000] * 9}, {"format": 10**30}):
        with pytest.raises(CheckpointError) as refused:
            manifest.decode_manifest(json.dumps(odd).encode(), path)
        assert len(str(refused.value)) < 300 + len(str(path))


def test_the_longest_manifest_that_is_written_is_read_and_a_longer_one_is_neither(
    tmp_path, monkeypatch
):
    path = write_checkpoint(tmp_path, 1) / MANIFEST
    content = path.read_bytes()
    body = json.loads(content)
    del body["sha256"]
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", len(content))
    assert encode_manifest(body) == manifest.read_manifest(path) == content
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", len(content) - 1)
    with pytest.raises(StorageError, match=f"would have {len(content)} bytes"):
        encode_manifest(body)
    with pytest.raises(CheckpointError, match="a link, or longer than"):
        manifest.read_manifest(path)
    monkeypatch.undo()
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(CheckpointError, match="a link, or longer than"):
        manifest.read_manifest(link)
