"""Parts of `torch_dist` checkpoints: pieces of tensors, Adam's state beside them, types."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.convert.huggingface.folder import HuggingFaceModel
from megasparse.convert.megatron.torch_dist import TorchDistModel, is_torch_dist
from megasparse.convert.megatron.torch_dist_files import METADATA, DistTensor, Piece
from megasparse.convert.megatron.torch_dist_optimizer import TorchDistOptimizer, _plain
from megasparse.convert.megatron.torch_dist_write import write_torch_dist
from megasparse.errors import CheckpointError
from tests.convert.models import save_model

WORDS = "embedding.word_embeddings.weight"
NORM = "decoder.final_layernorm.weight"


def _piece(path: Path, value: torch.Tensor, *offsets: int) -> Piece:
    """Behind what the file holds already."""
    buffer = io.BytesIO()
    torch.save(value.clone(), buffer)
    start = path.stat().st_size if path.exists() else 0
    with path.open("ab") as file:
        file.write(buffer.getvalue())
    return Piece(offsets, tuple(value.shape), path, start, len(buffer.getvalue()))


def _tensor(folder: Path, name: str, whole: torch.Tensor, layer: int | None = None) -> DistTensor:
    piece = _piece(folder / "__0_0.distcp", whole, *[0] * whole.dim())
    return DistTensor(name, str(whole.dtype), tuple(whole.shape), (piece,), folder, layer)


def test_pieces_of_several_files_make_a_tensor(tmp_path):
    whole = torch.randn(5, 6)
    cuts = ((0, 2, 0, 6), (2, 5, 0, 4), (2, 5, 4, 6))
    pieces = [
        _piece(tmp_path / f"{n % 2}.distcp", whole[a:b, c:d], a, c)
        for n, (a, b, c, d) in enumerate(cuts)
    ]
    tensor = DistTensor("w", "torch.float32", (5, 6), tuple(reversed(pieces)), tmp_path)
    assert tensor.shape == (5, 6) and tensor.dtype == torch.float32
    assert torch.equal(tensor.read(), whole)
    for some in (pieces[:2], [*pieces, pieces[0]]):
        wrong = DistTensor("w", "torch.float32", (5, 6), tuple(some), tmp_path)
        count = sum(torch.Size(one.sizes).numel() for one in some)
        with pytest.raises(CheckpointError, match=f"w: pieces of {count} values, expected 30"):
            wrong.read()


def test_a_layer_of_a_stack_is_in_the_piece_that_has_it(tmp_path):
    stack = torch.randn(5, 2, 3)
    file = tmp_path / "0.distcp"
    pieces = (
        _piece(file, stack[:2], 0, 0, 0),
        _piece(file, stack[2:, :1], 2, 0, 0),
        _piece(file, stack[2:, 1:], 2, 1, 0),
    )
    for layer in range(5):
        one = DistTensor("w", "torch.float32", (5, 2, 3), pieces, tmp_path, layer)
        assert one.shape == (2, 3) and torch.equal(one.read(), stack[layer])
    with pytest.raises(CheckpointError, match="pieces of 0 values, expected 6"):
        DistTensor("w", "torch.float32", (5, 2, 3), pieces, tmp_path, 5).read()


def test_a_piece_has_the_type_and_size_that_are_said(tmp_path):
    piece = _piece(tmp_path / "0.distcp", torch.arange(6.0), 0)
    assert torch.equal(piece.value(torch.float32, "w"), torch.arange(6.0))
    two = Piece((0, 0), (2, 3), piece.file, piece.start, piece.length)
    assert two.value(torch.float32, "w").shape == (2, 3)
    with pytest.raises(CheckpointError, match="w: found no tensor of torch.bfloat16"):
        piece.value(torch.bfloat16, "w")
    with pytest.raises(CheckpointError, match=r"w: found \(6,\)"):
        Piece((0,), (5,), piece.file, piece.start, piece.length).value(torch.float32, "w")
    other = DistTensor("w", "torch.int8", (6,), (piece,), tmp_path)
    with pytest.raises(CheckpointError, match="w: found torch.int8, expected torch.float32, "):
        other.read()
    for name in ("torch.float32", "torch.bfloat16", "torch.float16"):
        assert str(DistTensor("w", name, (6,), (piece,), tmp_path).dtype) == name


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor([3]), 3),
        (torch.tensor([[7]]), 7),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.zeros(0), []),
        ((0.9, torch.tensor(0.25)), [0.9, 0.25]),
        ([True, "a", None], [True, "a", None]),
        (object(), None),
        (4, 4),
    ],
)
def test_settings_are_as_json_has_them(value, plain):
    found = _plain(value)
    assert found == plain and type(found) is type(plain)


def _common(*groups: dict[str, Any], **state: Any) -> dict[str, Any]:
    return {"optimizer": {"param_groups": list(groups), "state": state}}


def _adam(folder: Path, common: dict[str, Any], **more: Any) -> TorchDistOptimizer:
    """Of an embedding of 5 rows, 3 without padding, and a norm, in two layers of a stack."""
    torch.manual_seed(0)
    wanted = {WORDS: torch.randn(5, 4).bfloat16(), NORM: torch.randn(2, 4).bfloat16()}
    weights, stored = {}, {}
    for name, value in wanted.items():
        layer = 1 if name == NORM else None
        weights[name] = _tensor(folder, name, value, layer)
        for number, kind in enumerate(("exp_avg", "exp_avg_sq", "param")):
            key = f"optimizer.state.{kind}.{name}"
            stored[key] = _tensor(folder, key, value.float() + number + 1)
    stored |= more.get("stored", {})
    for name in more.get("without", ()):
        del stored[name]
    return TorchDistOptimizer(common, stored, weights, {WORDS: (3, 4), NORM: (4,)}, "here")


def test_moments_and_masters_are_those_beside_a_weight_without_padding(tmp_path):
    groups: Any = (
        {"step": torch.tensor(7.0), "lr": torch.tensor([0.5]), "betas": (0.9, 0.95), "odd": 1},
        {"step": 7, "eps": 1e-8, "weight_decay": 0.0},
    )
    adam = _adam(tmp_path, _common(*groups, common_step=torch.tensor(7)))
    assert adam.steps == 7 and type(adam.steps) is int
    assert adam.settings == [
        {"steps": 7, "lr": 0.5, "betas": [0.9, 0.95]},
        {"steps": 7, "eps": 1e-8, "weight_decay": 0.0},
    ]
    for name, (rows, layer) in {WORDS: (3, None), NORM: (4, 1)}.items():
        weight = adam.masters[name].read() - 3
        for number, kind in enumerate(("exp_avg", "exp_avg_sq")):
            found = adam.read(name, kind)
            assert found.dtype == torch.float32 and found.is_contiguous()
            torch.testing.assert_close(found, weight[:rows] + number + 1)
        assert adam.masters[name].layer == layer


def test_a_master_has_one_of_two_names_or_is_the_weight(tmp_path):
    common, key = _common({"step": 1}), f"optimizer.state.param.{WORDS}"
    other = f"optimizer.state.fp32_param.{WORDS}"
    value = torch.full((5, 4), 9.0)
    second = {other: _tensor(tmp_path, other, value)}
    assert _adam(tmp_path, common, stored=second).masters[WORDS].name == key
    adam = _adam(tmp_path, common, stored=second, without=[key])
    assert adam.masters[WORDS].name == other
    with pytest.raises(CheckpointError, match=f"{WORDS}: found torch.bfloat16, expected a float32"):
        _adam(tmp_path, common, without=[key])
    low = {key: _tensor(tmp_path, key, value.bfloat16())}
    with pytest.raises(CheckpointError, match="found torch.bfloat16, expected a float32 master"):
        _adam(tmp_path, common, stored=low)


def test_what_lies_beside_a_weight_has_its_shape_and_is_finite(tmp_path):
    common, key = _common({"step": 1}), f"optimizer.state.exp_avg.{WORDS}"
    with pytest.raises(CheckpointError, match=f"holds no {key}; the state of Adam"):
        _adam(tmp_path, common, without=[key])
    other = {key: _tensor(tmp_path, key, torch.zeros(5, 3))}
    with pytest.raises(CheckpointError, match=r"found shape \(5, 3\), expected \(5, 4\)"):
        _adam(tmp_path, common, stored=other)
    for row, damaged in ((2, True), (3, False)):  # what pads the vocabulary is nobody's
        value = torch.zeros(5, 4)
        value[row, 0] = torch.nan
        adam = _adam(tmp_path, common, stored={key: _tensor(tmp_path, key, value)})
        if damaged:
            with pytest.raises(CheckpointError, match=f"exp_avg of {WORDS}"):
                adam.read(WORDS, "exp_avg")
        else:
            assert not adam.read(WORDS, "exp_avg").any()


@pytest.mark.parametrize(
    ("groups", "state", "steps"),
    [
        ([{"step": 1}], {}, 1),
        ([{"step": 2.0}, {"step": torch.tensor([2])}], {}, 2),
        ([{}, {"step": 5}], {}, 5),
        ([{}], {"common_step": torch.tensor(4.0)}, 4),
        ([{"step": 0}], {}, None),
        ([{"step": 1.5}], {}, None),
        ([{"step": 1}, {"step": 2}], {}, None),
        ([{"step": 3}], {"common_step": 4}, None),
        ([{"step": "3"}], {}, None),
        ([{}], {}, None),
    ],
)
def test_steps_are_one_whole_number_of_all_groups(tmp_path, groups, state, steps):
    if steps is None:
        with pytest.raises(CheckpointError, match="steps of the optimizer, expected one number"):
            _adam(tmp_path, _common(*groups, **state))
    else:
        assert _adam(tmp_path, _common(*groups, **state)).steps == steps


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (None, "holds no state of an optimizer"),
        ({}, "holds no state of an optimizer"),
        ([1], "holds no state of an optimizer"),
        ({0: {}}, "the states of 1 optimizers, expected one"),
        ({"param_state_sharding_type": "odd", "optimizer": {}}, "has the form 'odd'"),
        ({"optimizer": [1]}, "no param_groups"),
        ({"optimizer": {"param_groups": 3}}, "no param_groups"),
        ({"param_groups": [1]}, "no param_groups"),
    ],
)
def test_other_states_are_refused(tmp_path, optimizer, words):
    with pytest.raises(CheckpointError, match=words):
        _adam(tmp_path, {"optimizer": optimizer})


def test_the_state_may_lie_within_what_megatron_lays_around_it(tmp_path):
    inner = _common({"step": 3})["optimizer"]
    for form in ({}, {"param_state_sharding_type": "fully_reshardable"}):
        assert _adam(tmp_path, {"optimizer": {"optimizer": inner, **form}}).steps == 3


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_have_the_type_that_is_asked_for_or_that_of_the_file(tmp_path, stored):
    save_model(tmp_path / "hf", "llama", "10MB", stored)
    source = HuggingFaceModel(tmp_path / "hf")
    write_torch_dist(source, tmp_path / "td", 16)
    assert is_torch_dist(tmp_path / "td") and not is_torch_dist(tmp_path / "hf")
    for asked in (None, torch.float32, torch.bfloat16, torch.float16):
        model = TorchDistModel(tmp_path / "td", asked)
        wanted = asked or stored
        for entry in model.entries():
            value = model.read(entry.name)
            assert entry.dtype == value.dtype == wanted and entry.shape == tuple(value.shape)
            assert torch.equal(value, source.read(entry.name).to(wanted))
        assert model.optimizer is None and model.frozen_scales() == {}
        assert model.model.vocab_size == 131 and model.origin["format"] == "torch_dist"
    assert TorchDistModel(tmp_path / "td", vocab_size=100).read(WORDS).shape[0] == 100
    (tmp_path / "td" / "release" / METADATA).unlink()
    assert not is_torch_dist(tmp_path / "td")
