"""torch_dist checkpoints that megatron-core's own dist_checkpointing wrote, read; ours, loaded."""

from __future__ import annotations

import multiprocessing
import queue
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.convert.huggingface.folder import HuggingFaceModel
from megasparse.convert.megatron.files import arguments_of, load_weights
from megasparse.convert.megatron.torch_dist import TorchDistModel, is_torch_dist
from megasparse.convert.megatron.torch_dist_write import write_torch_dist
from megasparse.errors import CheckpointError, ConfigError
from tests import dist
from tests.convert.models import VOCAB, megasparse_logits, save_model
from tests.convert.test_megatron import GPT, LLAMA, SIZES, build, convert, logits_of


def _megatron(rank: int, world: int, folder: str, ours: str) -> dict[str, Any]:
    """A LLaMA saved on two tensor-parallel ranks, a tied GPT on two stages, with an optimizer's
    tensors; and our checkpoint loaded on two ranks. Logits, and the stage's tensors."""
    import argparse

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Its writer wants a GPU, a manager process and children; here are none, and the rank is a
    # daemon.
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[assignment, method-assign]
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    filesystem_async._get_write_results_queue = queue.Queue
    found: dict[str, Any] = {}
    for name, sizes, stages in (("llama", LLAMA, 1), ("gpt", GPT, 2)):
        arguments = {**SIZES, **sizes}
        model = build(rank, world, arguments, stages)
        state = model.sharded_state_dict()
        moments = torch.full((4,), 1.0)
        optimizer = ShardedTensor.from_rank_offsets("optimizer.state.x", moments, (0, rank, world))
        path = Path(folder) / name / "iter_0000007"
        path.mkdir(parents=True, exist_ok=True)
        content = {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0}
        whole = {**content, "model": state, "optimizer": {"x": optimizer}}
        dist_checkpointing.save(whole, str(path))
        (path.parent / "latest_checkpointed_iteration.txt").write_text("7\n")
        if stages == 1:
            found[name] = logits_of(model)
        else:
            # The copy of tied embeddings on the last stage is not where its key says.
            found[name] = {
                (one.key, one.global_offset[: one.prepend_axis_num]): one.data.detach().clone()
                for one in model.sharded_state_dict().values()
                if isinstance(one, ShardedTensor) and not (rank and "embedding" in one.key)
            }
    theirs = arguments_of(load_weights(Path(ours) / "release" / "common.pt"), Path(ours))
    model = build(rank, world, theirs)
    state = model.sharded_state_dict()
    loaded = dist_checkpointing.load({"model": state}, str(Path(ours) / "release"))
    model.load_state_dict(loaded["model"])
    found["ours"] = logits_of(model)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("torch_dist")
    logits = save_model(folder / "hf", "llama", "10MB")
    write_torch_dist(HuggingFaceModel(folder / "hf"), folder / "ours", 16)
    ranks = dist.run(_megatron, 2, str(folder), str(folder / "ours"))
    return {"folder": folder, "hugging face": logits, "ranks": ranks}


def test_a_checkpoint_of_two_tensor_parallel_ranks(saved, tmp_path):
    assert is_torch_dist(saved["folder"] / "llama")
    assert convert(saved["folder"] / "llama", tmp_path / "a") == 0
    logits = dist.run(megasparse_logits, 1, str(tmp_path / "a"))[0]
    wanted = saved["ranks"][0]["llama"][..., :VOCAB]
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_tied_checkpoint_of_two_stages(saved):
    source = TorchDistModel(saved["folder"] / "gpt" / "iter_0000007")
    names = {entry.name for entry in source.entries()}
    assert "output_layer.weight" not in names and len(names) == 28
    stages = [rank["gpt"] for rank in saved["ranks"]]
    assert all(len(stage) > 10 for stage in stages)
    seen = set()
    for (key, layer), value in ((k, v) for stage in stages for k, v in stage.items()):
        name = key.replace("layers.", f"layers.{layer[0]}.") if layer else key
        for theirs, ours in (
            ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
            ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
        ):
            name = name.replace(theirs, ours)
        assert torch.equal(source.read(name), value.reshape(source.read(name).shape)), name
        seen.add(name)
    assert seen == names


def test_megatron_core_loads_ours_on_two_ranks(saved):
    for rank in saved["ranks"]:
        logits = rank["ours"][..., :VOCAB]
        torch.testing.assert_close(logits, saved["hugging face"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [("neox", "parallel_residual is True"), ("olmo2", "norm_placement is 'post'")],
)
def test_what_megatron_has_no_layers_for_is_not_written(tmp_path, kind, setting):
    save_model(tmp_path / "hf", kind, "10MB")
    with pytest.raises(ConfigError, match=f"do not compute this model: {setting}"):
        write_torch_dist(HuggingFaceModel(tmp_path / "hf"), tmp_path / "out", 16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["qwen3, tied, windows", "smollm3", "opt", "gpt2"])
def test_what_is_written_is_read_again(tmp_path, kind):
    """Windows, layers without positions, biases, learned positions; settings too."""
    from megasparse.convert.huggingface.architecture import differences

    save_model(tmp_path / "hf", kind, "10MB")
    source = HuggingFaceModel(tmp_path / "hf")
    if kind == "opt":  # ReLU is no activation of Megatron's
        with pytest.raises(ConfigError, match="relu is True"):
            write_torch_dist(source, tmp_path / "td", 16)
        return
    write_torch_dist(source, tmp_path / "td", 16)
    again = TorchDistModel(tmp_path / "td")
    assert not differences(source.model, again.model)
    assert all(torch.equal(source.read(e.name), again.read(e.name)) for e in source.entries())


def _metadata(folder: Path) -> Path:
    save_model(folder / "hf", "llama", "10MB")
    write_torch_dist(HuggingFaceModel(folder / "hf"), folder / "td", 16)
    return folder / "td" / "release" / ".metadata"


def test_a_hostile_metadata_runs_nothing(tmp_path):
    """The name of a function is data: it is not called, and the file is refused."""
    import os
    import pickle

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = _metadata(tmp_path)
    path.write_bytes(pickle.dumps({"state_dict_metadata": Hostile()}))
    with pytest.raises(CheckpointError, match="is no metadata of torch_dist"):
        TorchDistModel(tmp_path / "td")
    assert not (tmp_path / "made").exists()


def test_hostile_pieces_run_nothing(tmp_path):
    import os

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = _metadata(tmp_path)
    source = TorchDistModel(tmp_path / "td")
    piece = source._tensors["decoder.final_layernorm.weight"].pieces[0]
    import io

    stream = io.BytesIO()
    torch.save(Hostile(), stream)
    file = path.parent / piece.file.name
    content = bytearray(file.read_bytes())
    content[piece.start : piece.start + piece.length] = stream.getvalue()[: piece.length].ljust(
        piece.length, b"\0"
    )
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="cannot be read"):
        source.read("decoder.final_layernorm.weight")
    assert not (tmp_path / "made").exists()


def test_damaged_metadata_is_one_clear_error(tmp_path):
    path = _metadata(tmp_path)
    whole = path.read_bytes()
    for number in range(0, len(whole), max(len(whole) // 60, 1)):
        path.write_bytes(whole[:number])
        with pytest.raises(CheckpointError):
            TorchDistModel(tmp_path / "td")
    for number in range(0, len(whole), max(len(whole) // 60, 1)):
        path.write_bytes(whole[:number] + bytes([whole[number] ^ 0xFF]) + whole[number + 1 :])
        try:
            TorchDistModel(tmp_path / "td")
        except CheckpointError as error:
            assert "\n" not in str(error)
