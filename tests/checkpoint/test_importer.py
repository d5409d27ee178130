"""A model from elsewhere as a checkpoint of step 0: its values, and what is beside them."""

from __future__ import annotations

import io
import stat
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.checkpoint import importer
from megasparse.checkpoint.directory import read_pointer
from megasparse.checkpoint.importer import write_imported
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.config import CompleteModel, load_config, narrowed, resolve
from megasparse.errors import StorageError
from megasparse.tensor_files import Entry
from tests.runs import TINY

WORDS = "embedding.word_embeddings.weight"
SHAPES = {WORDS: (35, 8), "decoder.a.weight": (16, 8), "decoder.a.bias": (16,)}


class _Model:
    """Stands for a model on disk, whose every value is another number."""

    where = "there"
    origin = {"format": "made up"}

    def __init__(self, dtype: torch.dtype = torch.float32, odd: str = "") -> None:
        model = resolve(load_config([*TINY, "--mock-data"]), 1).model
        self.model: Any = narrowed(CompleteModel, model, "test")
        self.model.vocab_size = 35
        self._kinds = {name: torch.float32 if name == odd else dtype for name in SHAPES}

    def entries(self) -> list[Entry]:
        return [Entry(name, self._kinds[name], shape) for name, shape in SHAPES.items()]

    def read(self, name: str, kind: str = "") -> torch.Tensor:
        first = 1000 * list(SHAPES).index(name) + 100 * len(kind)
        count = torch.Size(SHAPES[name]).numel()
        values = torch.arange(first, first + count).view(SHAPES[name])
        return values.to(torch.float32 if kind else self._kinds[name])

    def frozen_scales(self) -> dict[str, float]:
        return {"decoder.a.weight": 0.5}


def _written(tmp_path, source=None, **more) -> tuple[CheckpointReader, Any]:
    source = source or _Model()
    carried = tmp_path / "config.json"
    carried.write_text("{}")
    options = {"max_shard_bytes": 10**6, "vocabulary_multiple": 16, "carried": [carried], **more}
    folder = write_imported(source, tmp_path / "out", **options)
    assert folder == tmp_path / "out" / "step-00000000"
    return CheckpointReader(folder), source


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_all_values_are_there_and_the_vocabulary_is_padded_with_zeros(tmp_path, with_optimizer):
    source = _Model()
    optimizer: Any = SimpleNamespace(steps=7, read=source.read) if with_optimizer else None
    reader, _ = _written(tmp_path, source, optimizer=optimizer)
    kinds = {"param/": ("",), "optim/": ("exp_avg", "exp_avg_sq") if with_optimizer else ()}
    for prefix, names in kinds.items():
        assert len(reader.keys(prefix)) == len(names) * len(SHAPES)
        for name in SHAPES:
            for kind in names:
                value = reader.read(f"{prefix}{name}/{kind}".rstrip("/"))
                expected = source.read(name, kind)
                assert (
                    torch.equal(value[: len(expected)], expected) and value.dtype.is_floating_point
                )
                assert len(value) == (48 if name == WORDS else len(expected))
                assert not value[len(expected) :].any()
    assert reader.meta["optimizer_steps"] == (7 if with_optimizer else 0)


def test_what_is_said_of_it_is_that_nothing_was_trained_here(tmp_path):
    reader, source = _written(tmp_path)
    meta, state = reader.meta, reader.meta["state"]
    assert reader.imported and state["imported"] == source.origin
    assert meta["step"] == meta["consumed_samples"] == meta["optimizer_steps"] == 0
    assert meta["layout"] == {"world": 1, "tp": 1, "dp": 1, "pp": 1, "zero": 0}
    assert state["refreshes"] == state["skipped_steps"] == 0 and not state["flip_history"]
    assert state["vocab_size"] == 35 and state["scales"] == source.frozen_scales()
    assert len(meta["run_id"]) == 16
    assert read_pointer(tmp_path / "out") == 0
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert "vocab_size: 35" in text and "make_vocab_size_divisible_by: 16" in text
    assert (tmp_path / "out" / "huggingface" / "config.json").read_text() == "{}"
    assert stat.S_IMODE(reader.folder.stat().st_mode) == 0o700
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "step-00000000",
        "latest.json",
        "config.yaml",
        "huggingface",
    }


@pytest.mark.parametrize(
    ("dtype", "odd", "bf16"),
    [
        (torch.bfloat16, "", True),
        (torch.bfloat16, "decoder.a.bias", False),
        (torch.float32, "", False),
    ],
)
def test_it_is_of_bf16_where_all_its_weights_are(tmp_path, dtype, odd, bf16):
    reader, _ = _written(tmp_path, _Model(dtype, odd))
    assert reader.meta["config"]["train"]["bf16"] is bf16


@pytest.mark.parametrize(
    ("limit", "files"),
    # 48 x 8, 16 x 8 and 16 values of four bytes: 1536, 512 and 64.
    [(2112, 1), (2111, 2), (2048, 2), (1535, 2), (576, 2), (575, 3), (1, 3)],
)
def test_a_file_is_filled_to_its_limit_and_a_larger_tensor_has_its_own(tmp_path, limit, files):
    reader, source = _written(tmp_path, max_shard_bytes=limit)
    assert len(reader.files) == files
    assert torch.equal(reader.read("param/decoder.a.bias"), source.read("decoder.a.bias"))


def test_room_for_all_is_made_sure_of_before_anything_is_read(tmp_path, monkeypatch):
    needed: list[int] = []
    monkeypatch.setattr(importer, "check_free_space", lambda _, size, __: needed.append(size))
    _written(tmp_path, max_shard_bytes=600)
    assert needed == [1536 + 512 + 64 + 2**20]
    monkeypatch.undo()
    source = _Model()
    monkeypatch.setattr(source, "read", lambda name: pytest.fail(name))
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr("megasparse.atomic_files.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="no room"):
        write_imported(source, tmp_path / "other", 10**6, 16, [])
    assert not (tmp_path / "other").exists()


def test_its_bar_counts_bytes_and_is_shown_when_asked_for(tmp_path, monkeypatch):
    bars: list[Any] = []
    make = importer.progress

    def made(**how: Any) -> Any:
        bars.append((make(**{**how, "enabled": True, "stream": io.StringIO()}), how))
        return bars[-1][0]

    monkeypatch.setattr(importer, "progress", made)
    for name, more in (("a", {}), ("b", {"bar": True})):
        (tmp_path / name).mkdir()
        _written(tmp_path / name, **more)
    assert [how["enabled"] for _, how in bars] == [False, True]
    assert all(bar.n == bar.total == 1536 + 512 + 64 for bar, _ in bars)
