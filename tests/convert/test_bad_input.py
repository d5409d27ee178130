"""Bad models on the way in: one clear line, a non-zero exit, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.models import save_model, tensors
from tools import convert_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    for kind in ("llama", "llama-tied", "gpt2"):
        save_model(folder / kind, kind)
    return {kind: folder / kind for kind in ("llama", "llama-tied", "gpt2")}


def edit_json(folder: Path, name: str = "config.json", **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    content.update(changes)
    (folder / name).write_text(json.dumps(content))


def edit_tensor(folder: Path, name: str, change: Callable[[dict, str], None]) -> None:
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    content = load_file(path)
    change(content, name)
    save_file(content, path, {"format": "pt"})


def set_nan(content: dict, name: str) -> None:
    content[name].view(-1)[3] = float("nan")


def set_shape(content: dict, name: str) -> None:
    content[name] = content[name][:-1].clone()


def set_integer(content: dict, name: str) -> None:
    content[name] = content[name].to(torch.int32)


def drop(content: dict, name: str) -> None:
    del content[name]


def whole(folder: Path, change: Callable[[dict], None]) -> None:
    """One file in place of the shards, changed."""
    content = tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    change(content)
    save_file(content, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def odd_header(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header[max(header)]["dtype"] = "x" * 5000
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


DOWN = "model.layers.0.mlp.down_proj.weight"
CASES: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "missing shard": (
        "llama", lambda f: sorted(f.glob("model-*.safetensors"))[2].unlink(),
        ("model-00003-of-", "missing shard"),
    ),
    "a header of thousands of characters": ("llama", odd_header, ("model-00002-of-", " ... ")),
    "cut shard": ("llama", truncate, ("model-00002-of-", "damaged")),
    "shard outside": (
        "llama", lambda f: edit_json(f, INDEX, weight_map={DOWN: "../x.safetensors"}),
        ("../x.safetensors", "expected a name"),
    ),
    "tensor not in shard": ("llama", lambda f: edit_tensor(f, DOWN, drop), (DOWN, "holds no")),
    "wrong shape": (
        "llama", lambda f: edit_tensor(f, DOWN, set_shape), (DOWN, "(31, 48)", "expected (32, 48)"),
    ),
    "sizes of another model": (
        "llama", lambda f: edit_json(f, hidden_size=64, head_dim=12), ("found shape", "expected"),
    ),
    "integers": ("llama", lambda f: edit_tensor(f, DOWN, set_integer), (DOWN, "I32", "expected")),
    "NaN": ("llama", lambda f: edit_tensor(f, DOWN, set_nan), (DOWN, "1 values", "NaN")),
    "NaN in GPT-2": (
        "gpt2", lambda f: edit_tensor(f, "transformer.h.1.mlp.c_fc.weight", set_nan),
        ("transformer.h.1.mlp.c_fc.weight", "NaN"),
    ),
    "unknown architecture": (
        "llama", lambda f: edit_json(f, architectures=["BloomForCausalLM"]),
        ("BloomForCausalLM", "one of LlamaForCausalLM, GPT2LMHeadModel"),
    ),
    "no architecture": (
        "llama", lambda f: edit_json(f, architectures=None, model_type="bloom"), ("'bloom'",),
    ),
    "no size": ("llama", lambda f: edit_json(f, hidden_size=None), ("hidden_size", "nothing")),
    "size of text": ("gpt2", lambda f: edit_json(f, n_embd="32"), ("n_embd", "'32'", "int")),
    "another rotary scaling": (
        "llama", lambda f: edit_json(f, rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        ("rope_type", "'yarn'", "llama3"),
    ),
    "another activation": (
        "gpt2", lambda f: edit_json(f, activation_function="tanh"), ("activation_function", "tanh"),
    ),
    "quantized": (
        "llama", lambda f: edit_json(f, quantization_config={"quant_method": "gptq"}),
        ("quantization_config",),
    ),
    "no config": ("llama", lambda f: (f / "config.json").unlink(), ("config.json", "cannot")),
    "config is no JSON": (
        "llama", lambda f: (f / "config.json").write_text("{"), ("config.json", "damaged"),
    ),
    "tied weights absent": (
        "llama-tied", lambda f: whole(f, lambda c: c.update(
            {"lm_head.weight": c.pop("model.embed_tokens.weight")})),
        ("model.embed_tokens.weight", "lm_head.weight alone"),
    ),
    "output weights absent": (
        "llama", lambda f: whole(f, lambda c: c.pop("lm_head.weight")),
        ("lm_head.weight", "tie_word_embeddings false"),
    ),
    "tied weights differ": (
        "llama-tied", lambda f: whole(f, lambda c: c.update(
            {"lm_head.weight": c["model.embed_tokens.weight"] + 1})),
        ("lm_head.weight is not the embedding",),
    ),
    "tensor too many": (
        "llama", lambda f: whole(f, lambda c: c.update({"model.layers.0.x": torch.ones(2)})),
        ("1 tensors", "model.layers.0.x"),
    ),
    "pickled weights": ("llama", pickled, ("pytorch_model.bin", "pickle", "expected")),
    "no folder": ("llama", lambda f: shutil.rmtree(f), ("no folder",)),
}  # fmt: skip


def run(source: Path, output: Path) -> int:
    flags = ["--from", "huggingface", "--to", "megasparse"]
    return convert_checkpoint.main([*flags, "--input", str(source), "--output", str(output)])


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line_and_leaves_nothing(good, tmp_path, capsys, case):
    kind, spoil, words = CASES[case]
    source, output = tmp_path / "in" / "hf", tmp_path / "out" / "ours"
    shutil.copytree(good[kind], source)
    spoil(source)
    assert run(source, output) == 66
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and all(word in error[0] for word in words), error
    assert len(error[0]) < 3000
    assert not output.exists()
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_an_output_that_is_there_is_refused_and_left_alone(good, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert run(good["llama"], tmp_path / "out") == 74
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    (tmp_path / "out" / "mine").unlink()
    assert run(good["llama"], tmp_path / "out") == 0  # an empty folder may be there


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_conversion_leaves_nothing(good, tmp_path, monkeypatch, number):
    """The signal comes while tensors are written."""
    from megasparse.convert.huggingface.folder import HuggingFaceModel

    read, seen = HuggingFaceModel.read, []

    def interrupted(self: HuggingFaceModel, name: str) -> torch.Tensor:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(seen) == 8:
            os.kill(os.getpid(), number)
        return read(self, name)

    monkeypatch.setattr(HuggingFaceModel, "read", interrupted)
    # As at a terminal, also where the tests were started in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as caught:
            run(good["llama"], tmp_path / "ours")
        assert caught.value.code == 143
    else:
        assert run(good["llama"], tmp_path / "ours") == 130
    signal.signal(signal.SIGINT, before)
    assert len(seen) == 8 and seen[-1][0].startswith(".ours.")  # something had been written
    assert list(tmp_path.iterdir()) == []
