"""Every family of the table: logits of transformers at TP 1 and 2, and the same bits back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from megasparse.config import narrowed
from megasparse.config.resolved import CompleteModel
from megasparse.convert.export import ExportOptions, write_huggingface
from megasparse.convert.huggingface.architecture import (
    differences,
    huggingface_config,
    model_config,
)
from megasparse.convert.huggingface.families import FAMILIES as TABLE
from megasparse.convert.huggingface.folder import HuggingFaceModel
from tests import dist
from tests.convert import models
from tests.convert.models import FAMILIES, TOKENS, VOCAB, load_logits, save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Each kind's folder and the logits that transformers computes."""
    folder = tmp_path_factory.mktemp("families")
    found = {}
    for number, kind in enumerate(FAMILIES):
        wanted = save_model(folder / str(number), kind, "10MB")
        found[kind] = (folder / str(number), wanted)
    return found


SAID = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip
Computed = list[tuple[torch.Tensor, torch.Tensor]]


def _compute(rank: int, world: int, folders: list[str]) -> Computed:
    """Of each folder's model the logits of TOKENS `(B, S, V)`: of one pass, and as a generation
    computes them from the 6th token on, one after the other."""
    from megasparse.inference.loading import load_model
    from megasparse.megatron.inference import CachedDecoder

    tokens = torch.tensor(TOKENS)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    found = []
    for folder in folders:
        source = HuggingFaceModel(Path(folder))
        model, _ = load_model(source, torch.device("cpu"), world, bf16=False)
        with torch.no_grad():
            logits = model(tokens, positions, None, runtime_gather_output=True)
        decoder = CachedDecoder(model, tokens.shape[1], len(TOKENS))
        steps = [decoder.feed(tokens[:, :6])]
        steps += [decoder.feed(tokens[:, i : i + 1]) for i in range(6, tokens.shape[1])]
        found.append((logits[..., :VOCAB], torch.stack(steps, 1)[..., :VOCAB]))
    return found


@pytest.fixture(scope="module", params=[1, 2], ids=["tp 1", "tp 2"])
def computed(request, saved) -> dict[str, Computed]:
    """Of each kind what the ranks computed."""
    ranks = dist.run(_compute, request.param, [str(folder) for folder, _ in saved.values()])
    return {kind: [rank[n] for rank in ranks] for n, kind in enumerate(saved)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_transformers(saved, computed, kind):
    _, wanted = saved[kind]
    assert wanted.abs().max() > 1
    for logits, generated in computed[kind]:
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(generated, wanted[:, 5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_comes_back_from_its_settings_alone(saved, tmp_path, kind):
    """Without the `config.json` that it came with: what is written describes the same function,
    and transformers computes the same logits."""
    folder, wanted = saved[kind]
    source = HuggingFaceModel(folder)
    write_huggingface(source, tmp_path / "back", ExportOptions(10**9))
    again = HuggingFaceModel(tmp_path / "back")
    assert not differences(source.model, again.model)
    torch.testing.assert_close(
        load_logits(tmp_path / "back", torch.tensor(TOKENS)), wanted, atol=1e-5, rtol=1e-5
    )
    for entry in source.entries():
        assert torch.equal(source.read(entry.name), again.read(entry.name)), entry.name


@pytest.mark.parametrize("kind", FAMILIES)
def test_with_its_own_config_a_family_keeps_every_tensor(saved, tmp_path, kind):
    folder, _ = saved[kind]
    source = HuggingFaceModel(folder)
    options = ExportOptions(10**9, config=folder / "config.json")
    write_huggingface(source, tmp_path / "back", options)
    before, after = models.tensors(folder), models.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        first = 2 if "embed_positions" in name else 0  # OPT's rows for padding are zeros
        assert torch.equal(before[name][first:], after[name][first:]), name
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back")]
    assert configs[0] == configs[1]


def test_every_entry_of_the_table_is_tried():
    tried = {f"{name}ForCausalLM" for name, _ in FAMILIES.values()}
    assert tried | {"LlamaForCausalLM", "GPT2LMHeadModel"} == set(TABLE)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type: found 'longrope'"),
        ("qwen3", {"attention_bias": True}, "attention_bias: found True, expected False"),
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: found False"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim: found 16, expected 32"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers: found \[1, 0\], expected 4 of"),
        ("mistral", {"sliding_window": 0}, "sliding_window: found 0, expected at least 1"),
        (
            "qwen2",
            {"layer_types": ["linear_attention"] * 4, "use_sliding_window": True},
            "layer_types: found",
        ),
        ("neox", {"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention"),
    ],
)
def test_what_cannot_be_built_is_refused_by_its_field(saved, kind, changes, message):
    from megasparse.errors import CheckpointError

    config = json.loads((saved[kind][0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        model_config(config | changes, "config.json")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Gemma2", {}, "attn_logit_softcapping 50.0: softmax attention here has no cap"),
        ("Gemma2", {"attn_logit_softcapping": None}, "final_logit_softcapping 30.0"),
        (
            "Gemma2",
            {"attn_logit_softcapping": None, "final_logit_softcapping": None},
            "hidden_size 2304: Gemma multiplies embeddings",
        ),
        ("Gemma3", {}, "rope_parameters: layers with a window have a rotary base of their own"),
        ("Gemma", {}, "hidden_size 3072: Gemma multiplies embeddings"),
        ("Qwen2Moe", {}, "shared_expert_intermediate_size 5632: its layers have a shared expert"),
    ],
)
def test_a_family_that_cannot_be_built_is_refused_by_the_key_in_the_way(name, changes, words):
    """Of the class's own configuration."""
    import transformers

    from megasparse.errors import CheckpointError

    kind = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    config = {**kind().to_dict(), "architectures": [f"{name}ForCausalLM"], **changes}
    with pytest.raises(CheckpointError, match=f"{name}ForCausalLM cannot be built: {words}"):
        model_config(config, "config.json")


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_file_does_not_say_is_as_transformers_has_it(kind):
    """Of each family the class's own defaults, by an empty file but for the class."""
    import transformers

    name, _ = FAMILIES[kind]
    theirs = getattr(transformers, f"{name}Config")()
    said = {"architectures": [f"{name}ForCausalLM"]}
    # transformers has defaults of sizes, which a file always says.
    for key in SAID:
        said[key] = getattr(theirs, key, None)
    bare = model_config(said, "config.json")
    whole = model_config({**theirs.to_dict(), **said}, "config.json")
    assert not differences(bare, whole)


def test_a_model_that_no_family_computes_is_told_by_its_setting():
    from megasparse.errors import ConfigError

    config = json.loads(json.dumps(huggingface_config(_neox(), "float32")))
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    odd = _neox()
    odd.geglu, odd.exact_gelu = True, False
    with pytest.raises(
        ConfigError, match="computes this model: geglu is True, GPTNeoX.* has False"
    ):
        huggingface_config(odd, "float32")


def _neox() -> CompleteModel:
    from megasparse.config import fill_defaults, load_config

    flags = ["--position-embedding-type", "rope", "--parallel-residual", "--exact-gelu"]
    flags += ["--vocab-size", "131", "--rotary-percent", "0.5"]
    return narrowed(CompleteModel, fill_defaults(load_config(flags), 1).model, "here")


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_family_is_written_with_dropout(saved, kind):
    """The class's own default is another one in some families: OPT's is 0.1."""
    source = HuggingFaceModel(saved[kind][0])
    written = huggingface_config(source.model, "float32")
    config = transformers.CONFIG_MAPPING[written["model_type"]].from_dict(written)
    # What the file leaves out is what transformers takes.
    for found in (written, config.to_dict()):
        # Heads that are no part of a language model have dropout of their own.
        heads = ("classifier_dropout", "summary_first_dropout")
        dropped = {k: v for k, v in found.items() if "drop" in k and k not in heads}
        assert not any(dropped.values()), dropped
