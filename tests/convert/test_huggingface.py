"""Real Hugging Face models in and out: the same logits, and the same bits back."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.importer import write_imported
from megasparse.convert.huggingface.folder import HuggingFaceModel
from tests import dist
from tests.convert.models import KINDS, VOCAB, megasparse_logits, save_model, tensors
from tools import convert_checkpoint


def convert(*flags: object) -> int:
    return convert_checkpoint.main([str(flag) for flag in flags])


def to_megasparse(source: Path, output: Path, *flags: object) -> int:
    return convert(
        "--from",
        "huggingface",
        "--to",
        "megasparse",
        "--input",
        source,
        "--output",
        output,
        "--make-vocab-size-divisible-by",
        16,
        *flags,
    )


def to_huggingface(source: Path, output: Path, *flags: object) -> int:
    return convert(
        "--from", "megasparse", "--to", "huggingface", "--input", source, "--output", output, *flags
    )


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_and_the_round_trip_is_exact(tmp_path, kind):
    wanted = save_model(tmp_path / "hf", kind)
    assert to_megasparse(tmp_path / "hf", tmp_path / "ours", "--max-shard-size", "20KB") == 0
    for world in (1, 2):
        for logits in dist.run(megasparse_logits, world, str(tmp_path / "ours")):
            assert wanted.abs().max() > 1
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert to_huggingface(tmp_path / "ours", tmp_path / "back", "--max-shard-size", "8KB") == 0
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back")]
    assert configs[0] == configs[1]
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_keep_their_bits(tmp_path, dtype):
    save_model(tmp_path / "hf", "llama", "10MB", dtype)
    assert to_megasparse(tmp_path / "hf", tmp_path / "ours") == 0
    assert to_huggingface(tmp_path / "ours", tmp_path / "back") == 0
    assert to_huggingface(tmp_path / "ours", tmp_path / "wide", "--dtype", "float32") == 0
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert all(after[name].dtype == dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    wide = tensors(tmp_path / "wide")
    assert all(torch.equal(before[name].float(), wide[name]) for name in before)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_names_of_the_first_gpt2_release(tmp_path):
    """Without the prefix, with buffers, and with the tied weights stored twice."""
    from safetensors.torch import save_file

    save_model(tmp_path / "hf", "gpt2", "10MB")
    path = tmp_path / "hf" / "model.safetensors"
    plain = HuggingFaceModel(tmp_path / "hf")
    wanted = {entry.name: plain.read(entry.name) for entry in plain.entries()}
    old = {name.removeprefix("transformer."): t for name, t in tensors(tmp_path / "hf").items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, path)
    source = HuggingFaceModel(tmp_path / "hf")
    assert {entry.name for entry in source.entries()} == wanted.keys()
    assert all(torch.equal(source.read(name), wanted[name]) for name in wanted)


class _Counting:
    """A source that counts the bytes of its tensors that are still alive."""

    def __init__(self, source: HuggingFaceModel) -> None:
        self.model, self.where, self.origin = source.model, source.where, source.origin
        self._source = source
        self.alive = self.most = self.total = 0

    def entries(self):
        return self._source.entries()

    def frozen_scales(self):
        return {}

    def read(self, name: str) -> torch.Tensor:
        value = self._source.read(name)
        size = value.numel() * value.element_size()
        self.alive += size
        self.total += size
        self.most = max(self.most, self.alive)
        weakref.finalize(value, self._gone, size)
        return value

    def _gone(self, size: int) -> None:
        self.alive -= size


def test_a_conversion_holds_one_parameter_at_a_time(tmp_path):
    save_model(tmp_path / "hf", "llama", "10MB")
    source = _Counting(HuggingFaceModel(tmp_path / "hf"))
    write_imported(source, tmp_path / "ours", 10**9, 16, [])
    largest = max(entry.nbytes for entry in source.entries())
    assert source.total > 5 * largest
    assert source.most <= 2 * largest


def _train(rank: int, world: int, flags: list[str]) -> tuple[list[float], int]:
    from tests.runs import train

    rows = train(rank, world, flags)
    return [row["loss"] for row in rows], rows[0]["step"]


def _refusal(rank: int, world: int, flags: list[str]) -> str:
    """What a run says that cannot start; an error that is raised would end the pool of ranks."""
    from megasparse.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        _train(rank, world, flags)
    return str(caught.value)


def _flags(tmp_path: Path, dataset: str, name: str, *flags: str) -> list[str]:
    return [
        "--config",
        str(tmp_path / "ours" / "config.yaml"),
        "--seq-length",
        "32",
        "--train-iters",
        "3",
        "--global-batch-size",
        "4",
        "--micro-batch-size",
        "2",
        "--lr",
        "1e-3",
        "--data-path",
        dataset,
        "--split",
        "90,10,0",
        "--eval-iters",
        "0",
        "--sparsity-recipe",
        "fst",
        "--dense-tail-fraction",
        "0",
        "--run-dir",
        str(tmp_path / name),
        *flags,
    ]


def test_training_starts_from_a_converted_model(tmp_path, dataset):
    """By --load of a checkpoint and by --load-hf of the folder, in several layouts: step 1, the
    same losses, a fresh optimizer."""
    save_model(tmp_path / "hf", "llama")
    assert to_megasparse(tmp_path / "hf", tmp_path / "ours") == 0
    load = ["--load", str(tmp_path / "ours")]
    load_hf = ["--load-hf", str(tmp_path / "hf")]
    first, step = dist.run(_train, 1, _flags(tmp_path, dataset, "a", *load))[0]
    assert step == 1 and len(first) == 3
    other = _flags(tmp_path, dataset, "b", *load_hf, "--tensor-model-parallel-size", "2")
    assert dist.run(_train, 2, other)[0][0] == pytest.approx(first, abs=1e-5)
    # Another padding and ZeRO's own float32 masters.
    pipeline = ["--make-vocab-size-divisible-by", "64", "--pipeline-model-parallel-size", "2"]
    other = _flags(tmp_path, dataset, "c", *load, *pipeline, "--zero-stage", "1")
    assert dist.run(_train, 2, other)[0][0] == pytest.approx(first, abs=1e-5)
    other = _flags(tmp_path, dataset, "e", *load_hf, "--zero-stage", "3")
    assert dist.run(_train, 2, other)[0][0] == pytest.approx(first, abs=1e-5)
    fresh = dist.run(_train, 1, _flags(tmp_path, dataset, "d"))[0][0]
    assert abs(fresh[0] - first[0]) > 1e-3  # it was the weights


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden-size", "64"], "hidden_size 32, this run has 64"),
        (["--norm-epsilon", "1e-5"], "norm_epsilon 1e-06, this run has 1e-05"),
        (["--vocab-size", "200"], f"vocab_size {VOCAB}, this run has 200"),
    ],
)
def test_another_model_is_refused_with_both_values(tmp_path, flags, message):
    from megasparse.config import load_config
    from megasparse.convert.source import check_model
    from megasparse.errors import ConfigError

    save_model(tmp_path / "hf", "llama")
    assert to_megasparse(tmp_path / "hf", tmp_path / "ours") == 0
    config = load_config(["--config", str(tmp_path / "ours" / "config.yaml"), *flags])
    with pytest.raises(ConfigError, match=message):
        check_model(HuggingFaceModel(tmp_path / "hf"), config.model, config.model.vocab_size)


def test_a_run_refuses_what_it_cannot_start_from(tmp_path, dataset):
    from megasparse.errors import CheckpointError, ConfigError
    from megasparse.preflight.settings import prepare

    save_model(tmp_path / "hf", "llama")
    assert to_megasparse(tmp_path / "hf", tmp_path / "ours") == 0
    load_hf = ["--load-hf", str(tmp_path / "hf")]
    with pytest.raises(ConfigError, match="load and load_hf are both set"):
        prepare(_flags(tmp_path, dataset, "a", *load_hf, "--load", str(tmp_path / "ours")), 1)
    with pytest.raises(CheckpointError, match="holds no config.json"):
        prepare(_flags(tmp_path, dataset, "b", "--load-hf", str(tmp_path)), 1)
    for name, flags in (("c", load_hf), ("d", ["--load", str(tmp_path / "ours")])):
        other = _flags(tmp_path, dataset, name, *flags, "--ffn-hidden-size", "64")
        assert "ffn_hidden_size 48, this run has 64" in dist.run(_refusal, 1, other)[0]
