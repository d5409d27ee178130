"""Odd things in the place of files: told within an instant, never waited for, never followed."""

from __future__ import annotations

import os
import socket

import pytest

from megasparse.errors import CheckpointError
from megasparse.input_files import open_regular, read_regular, refuse_links, shown


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket", "missing", "long", "loop"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "thing"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long":
        path = tmp_path / ("x" * 300)
    elif kind == "device":
        path = "/dev/zero"
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    with pytest.raises(OSError) as refused:
        open_regular(path)
    assert refused.value.strerror and refused.value.filename
    with pytest.raises(OSError):
        read_regular(path)


def test_a_file_and_a_link_to_one_are_read_up_to_the_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="longer than 4 bytes"):
        read_regular(path, 4)


def test_links_out_of_a_folder_are_refused(tmp_path):
    model, secret = tmp_path / "model", tmp_path / "secret"
    (model / "sub").mkdir(parents=True)
    secret.write_text("secret")
    (model / "file").write_text("own")
    (model / "sub" / "inside").symlink_to(model / "file")
    refuse_links(model, CheckpointError)
    for name in ("a.json", "sub/b.json"):
        (model / name).symlink_to(secret)
        with pytest.raises(CheckpointError, match=f"{name}: a link to {secret}, outside"):
            refuse_links(model, CheckpointError)
        (model / name).unlink()


def test_links_of_a_hugging_face_cache_are_its_own(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    (tmp_path / "models--x" / "blobs" / "1234").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    refuse_links(snapshot, CheckpointError)
    (snapshot / "other").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match="outside"):
        refuse_links(snapshot, CheckpointError)


def test_values_are_shown_short():
    bomb: list = ["x"] * 9
    for _ in range(20):
        bomb = [bomb] * 9
    for value in (bomb, "x" * 10**6, 10**6000, {"a": {"b": bomb}}, list(range(10**5))):
        assert len(shown(value)) < 1000
    assert shown("short") == "'short'" and shown([1, "a"]) == "[1, 'a']"
