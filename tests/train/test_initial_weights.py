"""What a run takes over with the weights that it starts from."""

from __future__ import annotations

import json

import pytest

from megasparse.checkpoint.model import StoredModel
from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.checkpoint.parts import check_parts
from tests.parallel.trace import traced
from tests.runs import LLAMA, TINY, train
from tools import convert_checkpoint

S_STE = [*TINY, *LLAMA, "--sparsity-recipe", "s_ste", "--masked-decay", "none"]
# Far enough for a scale computed anew to be another one.
TRAINED = [*S_STE, "--train-iters", "6", "--lr", "3e-2"]
FINETUNED = [*S_STE, "--train-iters", "1", "--lr", "1e-6"]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("s_ste")
    dist.run(train, 1, [*TRAINED, "--data-path", dataset, "--run-dir", str(folder)])
    return folder / "checkpoints"


def _stored_scales(folder):
    return StoredModel(newest_valid(folder), effective=False).frozen_scales()


def _scales(folder, dataset, flags, world=1):
    arguments = [*FINETUNED, "--data-path", dataset, "--run-dir", str(folder), *flags]
    return dist.run(traced, world, arguments)[0][0]["scales"]


def _convert(source, target, folder, output):
    flags = ["--from", source, "--to", target, "--input", str(folder), "--output", str(output)]
    if source == "megasparse":
        flags.append("--master-weights")
    assert convert_checkpoint.main(flags) == 0
    return str(output)


@pytest.mark.parametrize("world", [1, 2])
def test_a_frozen_scale_stays_frozen_in_a_finetuning(tmp_path, dataset, trained, world):
    expected = _stored_scales(trained)
    assert len(expected) == 4
    start = ["--load", str(trained), "--finetune", "--tensor-model-parallel-size", str(world)]
    assert _scales(tmp_path / "same", dataset, start, world) == expected
    assert _stored_scales(tmp_path / "same" / "checkpoints") == expected
    anew = _scales(tmp_path / "anew", dataset, [*start, "--s-ste-scale", "every_step"], world)
    assert all(abs(anew[name] - value) > 1e-3 for name, value in expected.items())


def test_a_frozen_scale_goes_with_the_dense_weights_through_conversions(tmp_path, dataset, trained):
    expected = _stored_scales(trained)
    converted = _convert("megasparse", "huggingface", trained, tmp_path / "hf")
    assert _scales(tmp_path / "a", dataset, ["--load-hf", converted]) == expected
    back = _convert("huggingface", "megasparse", converted, tmp_path / "back")
    flags = ["--load", back, "--make-vocab-size-divisible-by", "128"]
    assert _scales(tmp_path / "b", dataset, flags) == expected


def test_scales_of_no_weight_are_refused(tmp_path, dataset, trained):
    converted = _convert("megasparse", "huggingface", trained, tmp_path / "hf")
    path = tmp_path / "hf" / "s_ste_scale.json"
    path.write_text(json.dumps({"nothing.weight": 1.5}))
    with pytest.raises(RuntimeError, match="found nothing.weight: 1.5, expected a weight's name"):
        _scales(tmp_path / "a", dataset, ["--load-hf", converted])


def test_weights_with_the_scale_multiplied_in_have_none(trained):
    assert StoredModel(newest_valid(trained)).frozen_scales() == {}


@pytest.mark.parametrize("effective", [True, False])
def test_tensor_parallel_ranks_read_their_parts_of_weights(trained, effective):
    """The same values as slices of the whole; all ranks together read about the whole once."""
    stored = StoredModel(newest_valid(trained), effective=effective)
    for world in (1, 2, 4):
        parts, whole = check_parts(stored, world)
        assert parts <= 1.1 * whole, world
