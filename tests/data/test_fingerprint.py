"""Digests of tokens: whole and sampled; a resume with other bytes is refused, sidecar or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megasparse.checkpoint.compatibility import check_same_run
from megasparse.config import load_config, resolve, to_dict
from megasparse.data import check as check_module
from megasparse.data import fingerprint
from megasparse.data.check import check_data
from megasparse.data.sidecar import bin_path
from megasparse.errors import ConfigError
from tests.runs import TINY


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(fingerprint, "BLOCKS", 16)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 8)


def test_a_sample_finds_damage_longer_than_its_gaps_everywhere(tmp_path, small_blocks):
    size = 4099
    content = np.random.default_rng(0).integers(1, 256, size, dtype=np.uint8).tobytes()
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    before = fingerprint.sampled_digest(path)
    assert before == fingerprint.sampled_digest(path)
    gap = size // 15 + 1
    for start in (0, *range(1, size - gap, 97), size - gap):
        path.write_bytes(content[:start] + bytes(gap) + content[start + gap :])
        assert fingerprint.sampled_digest(path) != before, start
    for other in (content[::-1], content + b"x", content[:-1], b""):
        path.write_bytes(other)
        assert fingerprint.sampled_digest(path) != before


def test_small_files_are_read_whole(tmp_path, small_blocks):
    path = tmp_path / "x.bin"
    digests = set()
    for n in range(128):
        path.write_bytes(bytes(n) + b"\1" + bytes(127 - n))
        digests.add(fingerprint.sampled_digest(path))
    assert len(digests) == 128


@pytest.mark.parametrize("large", [False, True])
def test_a_resume_with_other_bytes_is_refused(tmp_path, dataset, monkeypatch, large):
    if large:  # as a file above 1 GiB
        monkeypatch.setattr(check_module, "AUTO_VERIFY_BYTES", 0)
    for part in ("bin", "idx"):
        shutil.copy(f"{dataset}.{part}", tmp_path / f"data.{part}")

    def digests(*flags: str):
        config = resolve(load_config([*TINY, "--data-path", str(tmp_path / "data"), *flags]), 1)
        return config, check_data(config).digests

    config, saved = digests()
    assert ("sha256:all:0" in saved) is not large and "sampled:all:0" in saved
    meta = {"config": to_dict(config), "digests": saved, "state": {}}
    reader = SimpleNamespace(meta=meta, imported=False, folder=Path("step-00000001"))
    check_same_run(reader, config, saved)
    tokens = np.fromfile(path := bin_path(tmp_path / "data"), dtype=np.uint16)
    tokens[::-1].tofile(path)
    _, reversed_digests = digests()
    with pytest.raises(ConfigError, match=r"tokens \(all dataset 0, .*--override-data continues"):
        check_same_run(reader, config, reversed_digests)
    config.checkpoint.override_data = True
    check_same_run(reader, config, reversed_digests)
    _, whole = digests("--verify-data", "full")
    assert "sha256:all:0" in whole
    # A checkpoint of before, without these digests, says nothing of them.
    meta["digests"] = {k: v for k, v in saved.items() if ":" not in k.split(".")[0]}
    config.checkpoint.override_data = False
    check_same_run(reader, config, saved)
