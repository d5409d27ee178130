"""A sparse run exported: transformers computes what the trainer did, and every zero stays."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megasparse.checkpoint.model import StoredModel, open_checkpoint
from megasparse.config import load_config, resolve
from megasparse.convert import export as export_module
from megasparse.convert.export import ExportOptions
from megasparse.convert.packed import unpack_hopper, unpack_torch
from megasparse.data.sidecar import bin_path
from megasparse.distributed.control_plane import ControlPlane
from megasparse.kernels import is_24
from megasparse.sparsity.state import SparseWeight
from megasparse.tensor_files import raw_bytes
from tests import dist
from tests.convert.models import load_logits, tensors
from tests.runs import LLAMA, TINY, make_dataset, train
from tools import convert_checkpoint, export_sparse

ATTENTION = ["--sparse-layers", "*.mlp.linear_*", "*.self_attention.linear_*"]
# 130 tokens are padded to 144. Masks of sr_ste are refreshed at every step, and last by the
# evaluation; those of fst were last refreshed two steps before the end.
COMMON = ["--vocab-size", "130", "--train-iters", "6", "--lr", "1e-2", "--eval-iters", "1"]
RUNS = {
    "fst": ([*LLAMA, *ATTENTION, "--tensor-model-parallel-size", "2"], 2),
    "s_ste": (["--sparsity-recipe", "s_ste", "--masked-decay", "none", "--bf16"], 1),
    "sr_ste": ([*LLAMA, "--sparsity-recipe", "sr_ste", "--mask-update-interval", "1"], 1),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A tiny run of each recipe, with its validation loss."""
    folder = tmp_path_factory.mktemp("runs")
    valid = make_dataset(folder / "valid", 12, seed=1)
    make_dataset(folder / "train")
    for name, (flags, world) in RUNS.items():
        data = ["--train-data-path", str(folder / "train"), "--valid-data-path", valid]
        arguments = [*TINY, *COMMON, *data, "--run-dir", str(folder / name), *flags]
        rows = dist.run(train, world, arguments)[0]
        (folder / f"{name}.json").write_text(json.dumps(rows[-1]))
    return folder


def export(*flags: object) -> int:
    return export_sparse.main([str(flag) for flag in flags])


def trainer_samples(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of the first global batch of the validation data."""
    from megasparse.megatron.data.datasets import SampleOptions, Source, build_stream

    options = SampleOptions(seq_length=32, seed=1234, eod=129, vocab_size=130)
    source = Source(str(folder / "valid"), None, "x")
    cache = str(folder / "cache")
    stream = build_stream([source], "valid", (0.0, 1.0, 0.0), options, cache)
    samples = [stream[number] for number in range(4)]
    stacked = [
        torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in ("tokens", "labels")
    ]
    return stacked[0].long(), stacked[1].long()


@pytest.mark.parametrize("name", RUNS)
def test_transformers_gives_the_trainers_validation_loss(runs, tmp_path, name):
    assert export("--input", runs / name, "--output", tmp_path / "hf") == 0
    inputs, labels = trainer_samples(runs)
    logits = load_logits(tmp_path / "hf", inputs)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    row = json.loads((runs / f"{name}.json").read_text())
    # bfloat16 weights are exported as they are; the trainer also computed in bfloat16.
    tolerance = 2e-2 if name == "s_ste" else 1e-5
    assert float(loss) == pytest.approx(row["valid_loss"], abs=tolerance)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())

    beside = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"README.md", "config.json", "generation_config.json"} <= beside
    side = json.loads((tmp_path / "hf" / "sparsity.json").read_text())
    stored = tensors(tmp_path / "hf")
    assert side["tensors"].keys() == stored.keys() and side["source"]["step"] == 6
    assert side["packing"] == "dense"
    sparse = {key for key, record in side["tensors"].items() if record["2:4"]}
    expected = {"fst": 2 * 7, "sr_ste": 2 * 3, "s_ste": 2 * 2}
    assert len(sparse) == expected[name]
    for key, record in side["tensors"].items():
        value = stored[key]
        assert record["sha256"] == hashlib.sha256(raw_bytes(value)).hexdigest()
        assert record["density"] == pytest.approx(float((value != 0).float().mean()))
        if key in sparse:
            assert is_24(value, dim=record["dim"])
            assert record["density"] <= 0.5
            assert record["transposable"] == is_24(value, dim=1 - record["dim"])
            assert record["transposable"] == (name == "fst")
    # The zeros in transformers' own parameters, after its loading.
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[key] == 0, stored[key] == 0) for key in sparse)


def test_slorb_is_folded_in_or_written_beside(runs, tmp_path, capsys):
    flags = [*RUNS["sr_ste"][0], "--slorb-k", "16", "--valid-data-path", str(runs / "valid")]
    data = ["--train-data-path", str(runs / "train"), "--run-dir", str(tmp_path / "run")]
    row = dist.run(train, 1, [*TINY, *COMMON, *data, *flags])[0][-1]
    assert export("--input", tmp_path / "run", "--output", tmp_path / "folded") == 0
    assert "--slorb separate keeps the weights 2:4" in capsys.readouterr().err
    inputs, labels = trainer_samples(runs)
    logits = load_logits(tmp_path / "folded", inputs)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(row["valid_loss"], abs=1e-5)
    assert not (tmp_path / "folded" / "sparsity.json").exists()

    separate = ["--output", tmp_path / "separate", "--slorb", "separate"]
    assert export("--input", tmp_path / "run", *separate) == 0
    folded, pruned = tensors(tmp_path / "folded"), tensors(tmp_path / "separate")
    side = json.loads((tmp_path / "separate" / "sparsity.json").read_text())
    key = "model.layers.1.mlp.down_proj.weight"
    assert side["tensors"][key]["2:4"] and is_24(pruned[key]) and not is_24(folded[key])
    low_rank = load_file(tmp_path / "separate" / "slorb.safetensors")
    base = "decoder.layers.1.mlp.linear_fc2"
    added = low_rank[f"{base}.slorb_adapter"] @ low_rank[f"{base}.slorb_projection"]
    torch.testing.assert_close(pruned[key] + added, folded[key])


def test_scale_of_s_ste_is_folded_in(runs):
    model = StoredModel(open_checkpoint(runs / "s_ste", ControlPlane(None)))
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    scale = model.reader.read(f"sparsity/{name}/scale")
    from megasparse.kernels import soft_threshold24

    projected = soft_threshold24(model.reader.read(f"param/{name}"))
    wanted = (projected.float() * scale).to(torch.bfloat16)
    assert torch.equal(model.read(name), wanted) and float(scale) != 1.0


PACKED = {
    "hopper": ("weight.values", "weight.metadata", unpack_hopper),
    "torch": ("weight.packed", "weight.meta", unpack_torch),
}


@pytest.mark.parametrize("layout", PACKED)
def test_packed_matrices_hold_the_same_weights(runs, tmp_path, layout):
    first, second, unpack = PACKED[layout]
    source = wide_run(runs)
    dtype = ["--dtype", "bfloat16"]
    assert export("--input", source, "--output", tmp_path / "dense", *dtype) == 0
    assert export("--input", source, "--output", tmp_path / "p", "--format", layout, *dtype) == 0
    dense, packed = tensors(tmp_path / "dense"), tensors(tmp_path / "p")
    side = json.loads((tmp_path / "p" / "sparsity.json").read_text())
    sparse = [key for key, record in side["tensors"].items() if record["2:4"]]
    assert sparse and side["packing"] == layout
    for key in sparse:
        base = key.removesuffix("weight")
        assert torch.equal(unpack(packed[base + first], packed[base + second]), dense[key])
        names = side["tensors"][key]["stored"]
        taken = sum(raw_bytes(packed[name]).nbytes for name in names)
        # 1/2 for the values, 1/16 (2 of 16 bits) for where they are.
        assert taken <= 0.5 * dense[key].nbytes + dense[key].nbytes / 8 + 16
    for key in dense.keys() - set(sparse):
        assert torch.equal(packed[key], dense[key])
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert "quantization_config" not in config


def wide_run(folder: Path) -> Path:
    """A run whose layers have sizes that tensor cores take."""
    run = folder / "wide"
    if not run.exists():
        flags = [*LLAMA, "--ffn-hidden-size", "128", "--train-iters", "2", "--eval-iters", "0"]
        data = ["--data-path", str(folder / "train"), "--run-dir", str(run)]
        dist.run(train, 1, [*TINY, *data, *flags])
    return run


def test_what_cannot_be_exported_is_refused(runs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"

    def refused(code: int, *flags: object) -> str:
        assert export("--output", output, *flags) == code
        assert not output.exists() and list(tmp_path.iterdir()) == []
        return capsys.readouterr().err

    error = refused(64, "--input", runs / "fst", "--format", "hopper")
    assert "expected bfloat16 or float16" in error
    assert "holds no checkpoint" in refused(66, "--input", tmp_path)
    # Weights that are not what the recipe promises.
    monkeypatch.setattr(SparseWeight, "effective_at", lambda self, weight, step: weight)
    error = refused(66, "--input", runs / "fst")
    assert (
        "o_proj.weight (of decoder.layers.0.self_attention.linear_proj.weight) is not 2:4" in error
    )


def test_master_weights_are_not_taken_for_the_model(runs, tmp_path, capsys):
    flags = ["--from", "megasparse", "--to", "huggingface", "--input", str(runs / "fst")]
    output = tmp_path / "out"
    assert convert_checkpoint.main([*flags, "--output", str(output)]) == 64
    assert "export_sparse.py" in capsys.readouterr().err and not output.exists()
    assert convert_checkpoint.main([*flags, "--output", str(output), "--master-weights"]) == 0
    dense = tensors(output)["model.layers.0.mlp.down_proj.weight"]
    assert float((dense != 0).float().mean()) > 0.9


def test_the_validation_data_was_read(runs):
    """The samples compared above are in the dataset."""
    inputs, _ = trainer_samples(runs)
    tokens = np.fromfile(bin_path(str(runs / "valid")), dtype=np.uint16)
    assert set(inputs.unique().tolist()) <= set(tokens.tolist())


@pytest.mark.parametrize("style", [[], LLAMA])
def test_a_config_that_is_made_names_the_tokens_of_the_run(style):
    """Those of the architecture's class in transformers are of other tokenizers."""
    source = SimpleNamespace(model=resolve(load_config([*TINY, *style, "--mock-data"]), 1).model)
    special = {"bos_token_id": None, "eos_token_id": 7, "pad_token_id": 9}
    for given in (special, {"eos_token_id": 7}, {}):
        made = export_module._config(source, ExportOptions(1, special=given), {})
        expected = {**dict.fromkeys(special), **given}
        assert {name: made[name] for name in special} == expected
