"""What is written of a model, by a source in memory: tensors, proofs, and all files beside them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megasparse.convert import export
from megasparse.convert.export import ExportOptions, write_huggingface
from megasparse.convert.huggingface.architecture import model_config
from megasparse.convert.huggingface.folder import HuggingFaceModel
from megasparse.convert.huggingface.layout import parameter_shapes
from megasparse.convert.packed import FORMATS, unpack_hopper, unpack_torch
from megasparse.errors import CheckpointError, ConfigError
from megasparse.kernels import prune24_mask, transposable24_mask
from megasparse.tensor_files import Entry

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 24,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_head": 4, "n_layer": 1,
    "n_positions": 8, "vocab_size": 24,
}  # fmt: skip
FC1, FC2 = (f"decoder.layers.0.mlp.linear_fc{n}.weight" for n in (1, 2))


class Memory:
    """A `Source` of random weights."""

    where = "memory"

    def __init__(self, config, search=prune24_mask, dtype=torch.bfloat16, scales=()):
        self.model, self.origin = model_config(config, "config.json"), {"format": "memory"}
        self.scales = dict(scales)
        generator = torch.Generator().manual_seed(0)
        shapes = parameter_shapes(self.model)
        self.values = {
            name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in shapes.items()
        }
        for name in (FC1, FC2):
            self.values[name] *= search(self.values[name])

    def entries(self):
        return [Entry(name, t.dtype, tuple(t.shape)) for name, t in self.values.items()]

    def read(self, name):
        return self.values[name]

    def frozen_scales(self):
        return self.scales


def written(folder, source, **options):
    """Options of an export, to the content of the folder's JSON files and tensors."""
    tensors = write_huggingface(
        source, folder, ExportOptions(**{"max_shard_bytes": 10**9, **options})
    )
    files = {p.name: json.loads(p.read_text()) for p in folder.glob("*.json")}
    return tensors, files, load_file(folder / "model.safetensors")


SPARSE = frozenset({FC1, FC2})


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("packing", [None, "hopper", "torch"])
def test_sparse_matrices_are_written_dense_or_packed(tmp_path, config, packing):
    source = Memory(config)
    notes, files, stored = written(tmp_path / "out", source, sparse=SPARSE, packing=packing)
    side = files["sparsity.json"]
    assert side["format"] == 1 and side["packing"] == (packing or "dense")
    assert side["source"] == source.origin and side["tensors"] == notes
    of_ours = {name for name, note in notes.items() if note["parameter"] in SPARSE}
    assert len(of_ours) == (3 if config is LLAMA else 2)
    for name in of_ours:
        note = notes[name]
        assert note["2:4"] and not note["transposable"] and note["density"] == 0.5
        assert note["dim"] == (1 if config is LLAMA else 0) and note["dtype"] == "bfloat16"
        if packing is None:
            value = stored[name]
            assert note["file"] == "model.safetensors" and "stored" not in note
        else:
            parts = [stored[key] for key in note["stored"]]
            assert name not in stored and len(parts) == 2
            unpack = {"hopper": unpack_hopper, "torch": unpack_torch}[packing]
            value = unpack(*parts)
            value = value if config is LLAMA else value.t()
        assert list(value.shape) == note["shape"]
    whole = source.values[FC2]
    (fc2,) = (name for name in of_ours if notes[name]["parameter"] == FC2)
    if packing is None:
        assert torch.equal(stored[fc2], whole if config is LLAMA else whole.t())
        back = HuggingFaceModel(tmp_path / "out")
        assert all(torch.equal(back.read(n), t) for n, t in source.values.items())
    others = [note for name, note in notes.items() if name not in of_ours]
    assert not any(note["2:4"] for note in others) and {n["dim"] for n in others} == {None}
    assert "sparsity.json" not in written(tmp_path / "plain", source)[1]


def test_what_is_not_as_sparse_as_it_must_be_is_not_written(tmp_path):
    both = Memory(LLAMA, transposable24_mask)
    notes, _, _ = written(tmp_path / "both", both, sparse=SPARSE, transposable=True)
    assert all(note["transposable"] for note in notes.values() if note["parameter"] in SPARSE)
    rows = Memory(LLAMA)
    with pytest.raises(CheckpointError, match=r"\(of .*\) is 2:4, but not transposable"):
        written(tmp_path / "rows", rows, sparse=SPARSE, transposable=True)
    columns = Memory(LLAMA, lambda w: prune24_mask(w.t().contiguous()).t())
    with pytest.raises(CheckpointError, match="is not 2:4 along its input dimension"):
        written(tmp_path / "columns", columns, sparse=SPARSE)
    notes, _, _ = written(tmp_path / "free", columns)
    assert not any(note["2:4"] or note["transposable"] for note in notes.values())
    assert not any((tmp_path / name).exists() for name in ("rows", "columns"))


def test_embeddings_and_vectors_are_no_24_matrices():
    zeros = torch.zeros(8, 8)
    assert export._found("decoder.layers.0.mlp.linear_fc1.weight", zeros) == (True, True)
    for name in (
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "embedding.position_embeddings.weight",
    ):
        assert export._found(name, zeros) == (False, False)
    assert export._found("norm.weight", torch.zeros(8)) == (False, False)
    assert export._found("w", torch.zeros(8, 6)) == (False, True)
    assert export._found("w", torch.zeros(6, 8)) == (True, False)


def test_what_cannot_be_packed_is_refused_by_name(tmp_path):
    for packing, source, words in (
        ("hopper", Memory(LLAMA, dtype=torch.float32), "float32, expected bfloat16 or float16"),
        ("torch", Memory(LLAMA, dtype=torch.float32), "float32, expected bfloat16 or float16"),
        ("hopper", Memory({**LLAMA, "intermediate_size": 96}), r"\(96, 64\), expected multiples"),
        ("torch", Memory({**LLAMA, "intermediate_size": 80}), r"\(80, 64\), expected multiples"),
        ("torch", Memory({**LLAMA, "intermediate_size": 96}), r"\(64, 96\), expected multiples"),
    ):
        with pytest.raises(ConfigError, match=f"{packing}: .*{words}"):
            written(tmp_path / "out", source, sparse=SPARSE, packing=packing)
    assert FORMATS["torch"].refusal((32, 64), torch.float16) is None
    assert FORMATS["hopper"].refusal((64, 64), torch.float16) is None


def config_of(source, **options):
    """The `config.json` that would be written."""
    entries = {entry.name: entry for entry in source.entries()}
    return export._config(source, ExportOptions(10**9, **options), entries)


@pytest.mark.parametrize("dtypes", [["bfloat16"], ["bfloat16", "float16"]])
def test_a_config_is_made_or_taken_over(tmp_path, dtypes):
    source = Memory(LLAMA)
    if len(dtypes) > 1:
        source.values[FC1] = source.values[FC1].half()
    kind = dtypes[0] if len(dtypes) == 1 else "float32"
    made = config_of(source, special={"bos_token_id": 3, "eos_token_id": None})
    assert (made["dtype"], made["torch_dtype"]) == (kind, kind)
    ids = [made[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert ids == [3, None, None]
    given = {**LLAMA, "torch_dtype": "float64", "eos_token_id": [5, 6], "bos_token_id": 1, "x": 7}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    for eos, kept in ((6, [5, 6]), (9, 9)):
        found = config_of(source, config=path, special={"eos_token_id": eos})
        assert found == {**given, "torch_dtype": kind, "eos_token_id": kept}  # no other key
    path.write_text(json.dumps({**given, "num_hidden_layers": 2}))
    with pytest.raises(ConfigError, match="num_layers 1, this run has 2"):
        config_of(source, config=path)


def test_a_generation_ends_with_what_the_run_used(tmp_path):
    path, config = tmp_path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2}

    def of(before, stops=(), special=config, config=config):
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_text(json.dumps(before))
        options = ExportOptions(1, special=special, stops=list(stops))
        export._write_generation_config(tmp_path, config, options)
        return json.loads(path.read_text())

    assert of(None) == config
    assert of(None, [7, 2, 8])["eos_token_id"] == [2, 7, 8]
    before = {"eos_token_id": [4, 2], "top_k": 5, "pad_token_id": 9}
    assert of(before) == {"bos_token_id": 1, **before}
    assert of(before, [7])["eos_token_id"] == [4, 2, 7]
    assert of({"eos_token_id": 4})["eos_token_id"] == 2
    assert of({"eos_token_id": 4}, special={})["eos_token_id"] == 4
    assert of(None, [7], {}, {}) == {"eos_token_id": [7]}
    assert of(None, (), {}, {"eos_token_id": None}) == {}


def test_files_beside_the_model(tmp_path):
    text, side = tmp_path / "LICENSE", torch.arange(6.0).view(2, 3)
    text.write_text("free")
    source = Memory(LLAMA, scales={FC1: 0.5})
    _, files, _ = written(
        tmp_path / "out",
        source,
        carried={"LICENSE": text},
        extra_files={"more.json": {"a": [1]}, "model.bytes": b"\x00\x01", "tokenizer.json": {}},
        extra_tensors={"side.safetensors": {"s": side}},
    )
    out = tmp_path / "out"
    assert (out / "LICENSE").read_text() == "free" and files["more.json"] == {"a": [1]}
    assert (out / "model.bytes").read_bytes() == b"\x00\x01"
    assert torch.equal(load_file(out / "side.safetensors")["s"], side)
    assert files["s_ste_scale.json"] == {FC1: 0.5} == HuggingFaceModel(out).frozen_scales()
    assert "AutoTokenizer" in (out / "README.md").read_text()
    written(tmp_path / "less", Memory(LLAMA))
    less = tmp_path / "less"
    assert not (less / "s_ste_scale.json").exists()
    assert "AutoTokenizer" not in (less / "README.md").read_text()
    assert HuggingFaceModel(less).frozen_scales() == {}
