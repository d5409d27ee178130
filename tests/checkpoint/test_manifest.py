"""Every field of a manifest is checked."""

from __future__ import annotations

import json

import pytest

from megasparse.checkpoint.manifest import MANIFEST, encode_manifest
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from tests.checkpoint.saves import (
    write_checkpoint,
)

ALONE = ControlPlane(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=1), "format 1, expected 2"),
        (lambda m: m.update(format=3), "format 3, expected 2"),
        (lambda m: m.update(surprise=1), r"unknown keys \['surprise'\]"),
        (lambda m: m.pop("step"), "step: found nothing, expected int"),
        (lambda m: m["files"].update({"../evil": {"size": 0, "header_sha256": ""}}), "evil"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 0, "header_sha256": ""}}), "passwd"),
        (lambda m: m["pieces"][0].update(file="rank-00009.safetensors"), "unknown file"),
        (lambda m: m["pieces"][0]["shard"].update(global_shape=[1 << 40] * 2), "invalid for input"),
        (lambda m: m["pieces"][0]["shard"].update(world=0), "no part of a tensor"),
    ],
)  # fmt: skip
def test_a_manifest_that_agrees_with_itself_is_still_checked(tmp_path, change, message):
    folder = write_checkpoint(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("sha256")
    change(manifest)
    version = manifest.pop("format")
    content = json.loads(encode_manifest(manifest))
    content["format"] = version
    (folder / MANIFEST).write_bytes(
        encode_manifest(manifest) if version == 2 else json.dumps(content).encode()
    )
    with pytest.raises(CheckpointError, match=message):
        reader = CheckpointReader(folder)
        for key in list(reader.keys()):
            reader.read(key)
