"""A checkpoint as a model, against the tensors that a reader in memory gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.checkpoint.model import ADAPTER, PROJECTION, SCALE, StoredModel, open_checkpoint
from megasparse.checkpoint.pieces import Piece
from megasparse.config import load_config, resolve, to_dict
from megasparse.config.shapes import parameters
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from megasparse.kernels import is_24
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.sparsity.shard import WeightShard
from megasparse.sparsity.state import SparseWeight
from tests.checkpoint.parts import check_parts
from tests.checkpoint.saves import write_checkpoint
from tests.runs import LLAMA, TINY

WORDS, LAYER = "embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc"
FC1, FC2 = f"{LAYER}1.weight", f"{LAYER}2.weight"
ROWS = 48  # of the vocabulary in the checkpoint, of which 35 are tokens
SMALL = ["--hidden-size", "16", "--num-layers", "1", "--ffn-hidden-size", "32"]


class Reader:
    """A checkpoint in memory: a run's at step 5 of 20, with a moment and masks of the FFN."""

    imported = False
    folder = Path("there")

    def __init__(self, *flags: str) -> None:
        self.config = resolve(load_config([*TINY, *LLAMA, *SMALL, "--mock-data", *flags]), 1)
        self.config.model.vocab_size = 35
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            f"param/{one.name}": torch.randn(one.shape, generator=generator)
            for one in parameters(self.config.model, ROWS)
        }
        self.meta: dict[str, Any] = {
            "config": to_dict(self.config),
            "step": 5,
            "optimizer_steps": 4,
            "run_id": "ab",
            "state": {"vocab_size": 35},
        }
        recipe = recipe_of(self.config)
        for name in (FC1, FC2) if recipe.is_sparse else ():
            weight = self.tensors[f"param/{name}"]
            state = SparseWeight(name, recipe, WeightShard(tuple(weight.shape)))
            state.train_iters = 20
            state.effective_at(weight, 5)
            for kind, value in state.export_state().items():
                self.tensors[f"sparsity/{name}/{kind}"] = value

    def keys(self, prefix: str = "") -> list[str]:
        return [key for key in self.tensors if key.startswith(prefix)]

    def keys_beside(self, key: str, prefix: str) -> list[str]:
        return self.keys(prefix)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def read(self, key: str) -> torch.Tensor:
        return self.tensors[key].clone()

    def read_part(self, wanted: Piece) -> torch.Tensor:
        values = wanted.shard.slice_of(self.tensors[wanted.key]).reshape(-1)
        return values[slice(*wanted.range)].clone()


def _reader(*flags: str) -> Any:
    return Reader(*flags)


STE = ["--sparsity-recipe", "ste", "--masked-decay", "none"]
S_STE = ["--sparsity-recipe", "s_ste", "--masked-decay", "none"]


@pytest.mark.parametrize("flags", [[], STE, S_STE])
@pytest.mark.parametrize("effective", [True, False])
def test_weights_are_as_they_are_used_or_the_masters_and_parts_are_parts(flags, effective):
    reader = _reader(*flags)
    stored = StoredModel(reader, effective=effective)
    assert stored.pruned == stored.sparse == {FC1, FC2} and not stored.boosted
    for name in stored._shapes:
        master = reader.tensors[f"param/{name}"]
        value = stored.read(name)
        if effective and name in (FC1, FC2):
            assert is_24(value) and not is_24(master)
        else:
            assert torch.equal(value, master[: stored._shapes[name][0]])
    for world in (1, 2, 4):
        check_parts(stored, world)


def test_what_it_says_of_itself():
    stored = StoredModel(_reader())
    assert (stored.step, stored.optimizer_steps, stored.train_iters) == (5, 4, 20)
    assert stored.origin == {
        "format": "megasparse",
        "folder": str(Path("there").absolute()),
        "run_id": "ab",
        "step": 5,
        "recipe": "fst",
    }
    shapes = {one.name: one.shape for one in parameters(stored.model, 35)}
    assert {entry.name: entry.shape for entry in stored.entries()} == shapes


def test_a_dense_phase_and_a_dense_run_prune_nothing():
    reader = _reader("--dense-warmup-fraction", "0.5", "--dense-tail-fraction", "0.25")
    kinds = {}
    for step in (5, 10, 14, 15):
        reader.meta["step"] = step
        kinds[step] = StoredModel(reader).pruned
    assert kinds == {5: frozenset(), 10: {FC1, FC2}, 14: {FC1, FC2}, 15: frozenset()}
    reader.meta["step"] = 5
    assert torch.equal(StoredModel(reader).read(FC1), reader.tensors[f"param/{FC1}"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_values_are_of_the_type_that_was_asked_for(dtype):
    reader = _reader()
    norm = "decoder.final_layernorm.weight"
    reader.tensors[f"param/{norm}"] = reader.tensors[f"param/{norm}"].double()
    stored = StoredModel(reader, dtype=dtype)
    assert all(e.dtype == stored.read(e.name).dtype for e in stored.entries())
    assert stored.read(FC1).dtype == (dtype or torch.float32)
    whole = WeightShard((48, 16))
    assert stored.read_part(WORDS, whole).dtype == (dtype or torch.float32)
    assert stored.read_part(norm, WeightShard((16,))).dtype == (dtype or torch.float64)


def _boost(reader: Reader, name: str, trained: bool) -> torch.Tensor:
    """S and P of rank 4 beside a weight; their product."""
    base = f"param/{name.removesuffix('.weight')}"
    rows, columns = reader.shape(f"param/{name}")
    adapter, projection = torch.randn(rows, 4), torch.randn(4, columns)
    reader.tensors[base + ADAPTER] = adapter
    if not trained:
        return adapter.repeat_interleave(columns // 4, 1)
    reader.tensors[base + PROJECTION] = projection
    return adapter @ projection


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", [FC1, FC2])
def test_a_low_rank_branch_is_added_where_it_is_asked_for(name, trained):
    reader = _reader(*STE)
    pruned = StoredModel(reader).read(name)
    boost = _boost(reader, name, trained)
    folded, apart = StoredModel(reader), StoredModel(reader, fold=False)
    assert folded.boosted == apart.boosted == {name}
    assert folded.sparse == {FC1, FC2} - {name} and apart.sparse == folded.pruned == {FC1, FC2}
    torch.testing.assert_close(folded.read(name), pruned + boost)
    assert torch.equal(apart.read(name), pruned)
    master = StoredModel(reader, effective=False)
    assert torch.equal(master.read(name), reader.tensors[f"param/{name}"])
    for world in (1, 2):
        check_parts(folded, world, exact=False)
        check_parts(apart, world)
        check_parts(master, world)


def test_scales_of_groups_belong_to_the_weight_pruned_or_not():
    reader = _reader(*STE)
    pruned, master = StoredModel(reader).read(FC1), reader.tensors[f"param/{FC1}"]
    scale = torch.rand(64, 2) + 0.5
    reader.tensors[f"param/{LAYER}1{SCALE}"] = scale
    spread = scale.repeat_interleave(8, 1)
    for effective, expected in ((True, pruned), (False, master)):
        stored = StoredModel(reader, effective=effective)
        torch.testing.assert_close(stored.read(FC1), expected * spread)
        for world in (1, 2):
            check_parts(stored, world)


def test_frozen_scales_are_those_that_the_weights_are_given_without():
    reader = _reader(*S_STE)
    scale = {name: float(reader.tensors[f"sparsity/{name}/scale"]) for name in (FC1, FC2)}
    assert StoredModel(reader, effective=False).frozen_scales() == scale
    assert StoredModel(reader).frozen_scales() == {}
    every = _reader(*S_STE, "--s-ste-scale", "every_step")
    every.tensors[f"sparsity/{FC1}/scale"] = torch.tensor(2.0)
    assert StoredModel(every, effective=False).frozen_scales() == {}
    reader.imported = True
    assert StoredModel(reader).frozen_scales() == {}
    reader.meta["state"]["scales"] = {FC1: 0.5}
    assert StoredModel(reader).frozen_scales() == {FC1: 0.5}


@pytest.mark.parametrize(
    ("said", "config", "given", "expected"),
    [
        (35, 36, None, 35),
        (None, 36, None, 36),
        (35, 36, 34, 34),
        (None, None, None, None),
        (0, None, None, None),
        ("35", None, None, None),
        (-1, None, None, None),
        (1, None, None, 1),
    ],
)
def test_tokens_are_those_before_padding(said, config, given, expected):
    reader = _reader()
    reader.meta["state"] = {"vocab_size": said}
    reader.meta["config"]["model"]["vocab_size"] = config
    if expected is None:
        with pytest.raises(CheckpointError, match="does not say how many tokens"):
            StoredModel(reader, vocab_size=given)
        return
    assert StoredModel(reader, vocab_size=given).read(WORDS).shape == (expected, 16)


def test_a_moment_is_cut_and_padded_as_its_parameter_is():
    reader = _reader()
    for name in (WORDS, FC1):
        value = torch.randn(reader.shape(f"param/{name}"))
        reader.tensors[f"optim/{name}/exp_avg"] = value
    stored = StoredModel(reader)
    assert stored.moment_part(FC1, "exp_avg_sq", WeightShard((64, 16))) is None
    moments = {name: reader.tensors[f"optim/{name}/exp_avg"] for name in (WORDS, FC1)}
    padded = torch.cat([moments[WORDS][:35], torch.zeros(29, 16)])
    for rank in range(4):
        shard = WeightShard((64, 16), 0, rank, 4)
        part = stored.moment_part(WORDS, "exp_avg", shard)
        assert part is not None and torch.equal(part, shard.slice_of(padded))
        shard = WeightShard((64, 16), 0, rank, 4, 2)
        part = stored.moment_part(FC1, "exp_avg", shard)
        assert part is not None and torch.equal(part, shard.slice_of(moments[FC1]))
    with pytest.raises(CheckpointError, match="expects .64, 20"):
        stored.moment_part(FC1, "exp_avg", WeightShard((64, 20)))
    for name in (WORDS, FC1):
        reader.tensors[f"optim/{name}/exp_avg"][1, 1] = torch.nan
        with pytest.raises(CheckpointError, match=f"exp_avg of {name}: found 1 values"):
            stored.moment_part(name, "exp_avg", WeightShard(tuple(moments[name].shape)))


def test_a_vocabulary_without_some_of_its_tokens_is_refused():
    stored = StoredModel(_reader(), vocab_size=48)  # exactly those that are there
    assert stored.read_part(WORDS, WeightShard((64, 16))).shape == (64, 16)
    short = StoredModel(_reader(), vocab_size=49)
    for shape in ((64, 16), (49, 16)):
        with pytest.raises(CheckpointError, match=r"\(48, 16\), the model expects"):
            short.read_part(WORDS, WeightShard(shape))
    with pytest.raises(CheckpointError, match="found shape"):
        short.read(WORDS)
    with pytest.raises(CheckpointError, match=r"expects \(64, 8\)"):
        stored.read_part(WORDS, WeightShard((64, 8)))


def test_parameters_that_are_missing_odd_or_not_finite_are_named():
    reader = _reader()
    reader.tensors["param/odd.weight"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="holds 1 parameters .*first is odd.weight"):
        StoredModel(reader)
    del reader.tensors["param/odd.weight"]
    # A branch or a scale of no weight is none.
    for part in (ADAPTER, SCALE):
        reader.tensors[f"param/odd{part}"] = torch.zeros(2, 2)
        with pytest.raises(CheckpointError, match=f"first is odd{part}"):
            StoredModel(reader)
        del reader.tensors[f"param/odd{part}"]
    reader.tensors[f"param/{FC2}"][0, 0] = torch.inf
    stored = StoredModel(reader, effective=False)
    for read in (stored.read, lambda name: stored.read_part(name, WeightShard((16, 32)))):
        with pytest.raises(CheckpointError, match=f"{FC2}: found 1 values"):
            read(FC2)
    with pytest.raises(CheckpointError, match=r"found shape|expects \(16, 20\)"):
        stored.read_part(FC2, WeightShard((16, 20)))
    del reader.tensors[f"param/{FC2}"]
    with pytest.raises(CheckpointError, match=f"holds no parameter {FC2}"):
        StoredModel(reader)


def test_a_checkpoint_is_found_by_its_own_folder_or_by_its_run(tmp_path):
    alone, root = ControlPlane(None), tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        write_checkpoint(root, step)
    for path, step in ((root / "step-00000001", 1), (root, 2), (tmp_path / "run", 2)):
        assert open_checkpoint(path, alone).meta["step"] == step
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path, alone)
