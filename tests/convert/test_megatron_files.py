"""Which files make up a Megatron checkpoint, in each layout, and what is missing of one."""

from __future__ import annotations

import argparse
import io
from fractions import Fraction

import pytest
import torch

from megasparse.convert.megatron.files import (
    MegatronFiles,
    Record,
    arguments_of,
    iteration_folder,
    load_inert,
    load_weights,
)
from megasparse.errors import CheckpointError

ARGS = argparse.Namespace(num_layers=2)


def save(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def one(value):
    return torch.full((2,), float(value))


def test_ranks_and_stages_of_megatron(tmp_path):
    for rank in range(2):
        for stage in range(3):
            content = {"model": {"a": {"b": one(10 * rank + stage), "c": 1}}, "args": ARGS}
            name = "model_rng.pt" if stage == 1 else "model_optim_rng.pt"
            save(tmp_path, f"mp_rank_{rank:02d}_{stage:03d}/{name}", content)
    files = MegatronFiles(tmp_path)
    assert (files.kind, files.tp, files.pp) == ("megatron", 2, 3)
    assert files.arguments() == {"num_layers": 2}
    found = files.stages(1)
    assert [list(stage) for stage in found] == [["a.b"]] * 3
    assert [float(stage["a.b"][0]) for stage in found] == [10, 11, 12]
    (tmp_path / "mp_rank_01_002" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_01_002: holds no model_optim_rng.pt"):
        MegatronFiles(tmp_path)
    (tmp_path / "mp_rank_01_002").rmdir()
    with pytest.raises(CheckpointError, match="tensor-parallel rank 1, pipeline stage 2 is miss"):
        MegatronFiles(tmp_path)


def test_ranks_without_stages(tmp_path):
    for rank in range(2):
        save(tmp_path, f"mp_rank_{rank:02d}/model_optim_rng.pt", {"model": {"w": one(rank)}})
    (tmp_path / "mp_rank_02").write_text("no folder")
    files = MegatronFiles(tmp_path)
    assert (files.tp, files.pp) == (2, 1)
    assert [float(files.stages(rank)[0]["w"][0]) for rank in range(2)] == [0, 1]
    with pytest.raises(CheckpointError, match="holds no args of Megatron"):
        files.arguments()
    (tmp_path / "linked").symlink_to(tmp_path.parent)
    with pytest.raises(CheckpointError, match="linked"):
        MegatronFiles(tmp_path)


def test_ranks_of_deepspeed(tmp_path):
    for rank in range(2):
        content = {"module": {"w": one(rank)}, **({} if rank else {"args": ARGS})}
        save(tmp_path, f"mp_rank_{rank:02d}_model_states.pt", content)
    files = MegatronFiles(tmp_path)
    assert (files.kind, files.tp, files.pp) == ("deepspeed", 2, 1)
    assert float(files.stages(1)[0]["w"][0]) == 1 and files.arguments() == {"num_layers": 2}
    save(tmp_path, "mp_rank_01_model_states.pt", {"model": {}})
    with pytest.raises(CheckpointError, match="holds no 'module'"):
        files.stages(1)
    (tmp_path / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="rank 0, pipeline stage 0 is missing"):
        MegatronFiles(tmp_path)


def test_layers_of_a_pipeline_module(tmp_path):
    for layer in (1, 3, 12):
        for rank in range(2):
            name = f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
            save(tmp_path, name, {"w": one(100 * rank + layer)})
    with pytest.raises(CheckpointError, match="mp_rank_00_model_states.pt is missing"):
        MegatronFiles(tmp_path)
    save(tmp_path, "mp_rank_00_model_states.pt", {"args": {"num_layers": 3}})
    files = MegatronFiles(tmp_path)
    assert (files.kind, files.tp, files.pp) == ("deepspeed-pipeline", 2, 1)
    assert [float(stage["w"][0]) for stage in files.stages(1)] == [101, 103, 112]
    assert files.arguments() == {"num_layers": 3}
    (tmp_path / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="layer_03-model_01-model_states.pt: missing"):
        MegatronFiles(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="found no mp_rank_00/model_optim_rng.pt"):
        MegatronFiles(tmp_path)
    save(tmp_path, "mp_rank_00/model_optim_rng.pt", {"model0": {}, "model": {}})
    with pytest.raises(CheckpointError, match="interleaved pipeline stages"):
        MegatronFiles(tmp_path).stages(0)
    save(tmp_path, "mp_rank_00/model_optim_rng.pt", {"model": one(1)})
    with pytest.raises(CheckpointError, match="holds no 'model'"):
        MegatronFiles(tmp_path).stages(0)


def test_a_folder_points_to_its_latest_iteration(tmp_path):
    (tmp_path / "iter_0000120").mkdir()
    (tmp_path / "global_step7").mkdir()
    assert iteration_folder(tmp_path) == tmp_path
    (tmp_path / "latest").write_text("global_step7\n")
    assert iteration_folder(tmp_path) == tmp_path / "global_step7"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("120\n")
    assert iteration_folder(tmp_path) == tmp_path / "iter_0000120"
    for text in ("121", "../x", "."):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(CheckpointError, match="which is no folder there"):
            iteration_folder(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder, expected a Megatron checkpoint"):
        iteration_folder(tmp_path / "none")


def test_versions_that_order_qkv_otherwise(tmp_path):
    for version in (None, 3.0, 3, 4.5):
        content = {"args": {"a": 1}} | ({} if version is None else {"checkpoint_version": version})
        assert arguments_of(content, tmp_path) == {"a": 1}
    for version in (2.5, 0, "3.0"):
        with pytest.raises(CheckpointError, match=f"checkpoint_version {version}, expected 3.0"):
            arguments_of({"args": {"a": 1}, "checkpoint_version": version}, tmp_path)
    record = Record()
    record.__setstate__({"b": 2})
    record.__setstate__(None)
    assert arguments_of({"args": record}, tmp_path) == {"b": 2}


def test_nothing_but_plain_values_is_loaded(tmp_path):
    path = save(tmp_path, "odd.pt", {"w": Fraction(1, 2)})
    with pytest.raises(CheckpointError, match="odd.pt: names fractions.Fraction, expected tensors"):
        load_weights(path)
    with pytest.raises(CheckpointError, match="found list, expected a dict"):
        load_weights(save(tmp_path, "list.pt", [1]))
    stream = io.BytesIO()
    torch.save({"w": one(3), "args": ARGS}, stream)
    found = load_inert(stream.getvalue(), "bytes")
    assert float(found["w"][0]) == 3 and vars(found["args"]) == {"num_layers": 2}
    with pytest.raises(CheckpointError, match="bytes: cannot be loaded"):
        load_inert(stream.getvalue()[:40], "bytes")
