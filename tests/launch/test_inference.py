"""launch/generate.py and launch/evaluate.py on a tiny trained model, in several layouts."""

from __future__ import annotations

import json
import logging
import math
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import evaluate, generate
from megasparse.data.sidecar import bin_path
from megasparse.errors import ConfigError, DataError
from megasparse.inference.perplexity import windows
from megasparse.inference.sampling import Sampling, choose_token
from tests import dist
from tests.convert.models import load_logits
from tests.runs import LLAMA, TINY, make_dataset, train
from tools import export_sparse

ROOT = Path(__file__).parents[2]


def run(rank: int, world: int, name: str, flags: list[str]) -> str:
    """What a launcher prints on this rank."""
    script = {"evaluate": evaluate, "generate": generate}[name]
    with redirect_stdout(StringIO()) as printed:
        getattr(script, name)(script.parse_args(flags))
    return printed.getvalue()


def refusal(rank: int, world: int, name: str, flags: list[str]) -> str:
    """What it says instead; an error that is raised would end the pool of ranks."""
    with pytest.raises(ConfigError) as caught:
        run(rank, world, name, flags)
    return str(caught.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A run of a LLaMA, its data, a tokenizer of numbers, and the run exported."""
    import tokenizers

    folder = tmp_path_factory.mktemp("inference")
    words = {str(number): number for number in range(127)} | {"<eod>": 127}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    make_dataset(folder / "data")
    flags = [
        *TINY,
        *LLAMA,
        "--lr",
        "1e-2",
        "--data-path",
        str(folder / "data"),
        "--run-dir",
        str(folder / "run"),
        "--tokenizer-model",
        str(folder / "tokenizer.json"),
    ]
    dist.run(train, 1, flags)
    arguments = ["--input", str(folder / "run"), "--output", str(folder / "hf")]
    assert export_sparse.main(arguments) == 0
    make_dataset(folder / "valid", 5, seed=1)
    return {name: folder / name for name in ("run", "hf", "valid", "tokenizer.json")}


def greedy_by_transformers(folder: Path, ids: list[int], count: int) -> list[int]:
    """The whole context anew for every token: no cache to be wrong."""
    ids = list(ids)
    for _ in range(count):
        logits = load_logits(folder, torch.tensor([ids]))[0, -1]
        best = logits.topk(2)
        assert best.values[0] - best.values[1] > 1e-4
        ids.append(int(best.indices[0]))
    return ids


def test_greedy_text_is_that_of_transformers_for_every_layout_and_source(made):
    prompt = "0 7 42"
    wanted = greedy_by_transformers(made["hf"], [0, 7, 42], 8)
    flags = ["--prompt", prompt, "--max-new-tokens", "8", "--greedy"]
    for world in (1, 2):
        for source in (["--load", str(made["run"])], ["--load-hf", str(made["hf"])]):
            layout = ["--tensor-model-parallel-size", str(world)]
            texts = dist.run(run, world, "generate", [*flags, *source, *layout])
            assert texts[1:] == [""] * (world - 1)  # the first rank prints
            printed = texts[0].removeprefix(prompt)
            assert [int(word) for word in (prompt + " " + printed).split()] == wanted


def test_a_seed_draws_the_same_text_on_one_rank_and_two(made):
    flags = ["--load", str(made["run"]), "--prompt", "5", "--max-new-tokens", "20", "--seed", "3"]
    flags += ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.95"]
    one = dist.run(run, 1, "generate", flags)[0]
    two = dist.run(run, 2, "generate", [*flags, "--tensor-model-parallel-size", "2"])[0]
    other = dist.run(run, 1, "generate", [*flags, "--seed", "4"])[0]
    assert one == two != other and len(one.split()) > 10


def test_the_export_has_tokenizer_tokens_and_card(made, tmp_path, caplog):
    import transformers

    folder = made["hf"]
    engine = transformers.AutoTokenizer.from_pretrained(folder)
    assert engine("0 7 <eod> 42")["input_ids"] == [0, 7, 0, 0, 42]  # text is no control token
    assert engine.eos_token_id == engine.pad_token_id == 127 and engine.bos_token_id is None
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        assert content["eos_token_id"] == content["pad_token_id"] == 127, name
    card = (folder / "README.md").read_text()
    for words in (
        "recipe: `fst`, step 20",
        "80 sequences of 32 tokens",
        "data: `data`",
        "training loss: ",
        "6 of 21 tensors, 6 of them along both dimensions",
        "model.layers.1.mlp.down_proj.weight",
        "AutoTokenizer",
    ):
        assert words in card, card
    export = ["--input", str(made["run"]), "--output"]
    assert export_sparse.main([*export, str(tmp_path / "a"), "--eod-token", "5"]) == 65
    moved = made["tokenizer.json"].rename(tmp_path / "tokenizer.json")
    try:
        assert export_sparse.main([*export, str(tmp_path / "a")]) == 65
        assert not (tmp_path / "a").exists()
        assert export_sparse.main([*export, str(tmp_path / "b"), "--no-tokenizer"]) == 0
        where = ["--tokenizer-model", str(moved)]
        assert export_sparse.main([*export, str(tmp_path / "c"), *where]) == 0
    finally:
        moved.rename(made["tokenizer.json"])
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    same = "tokenizer.json"
    assert (tmp_path / "c" / same).read_bytes() == (folder / same).read_bytes()


def test_a_continuation_beyond_the_context_is_told(caplog):
    caplog.set_level(logging.INFO, "megasparse")  # as on the first rank
    assert generate.context_for(10, 20, 32) == 30 and generate.context_for(12, 20, 32) == 32
    assert not caplog.records
    assert generate.context_for(30, 20, 32) == 32
    assert "2 of 20 new tokens: the prompt has 30, the model a context of 32" in caplog.text


def test_a_prompt_beyond_the_context_is_refused(made):
    flags = ["--load", str(made["run"]), "--prompt", "1 " * 40]
    assert "40 tokens, the model a context of 32" in dist.run(refusal, 1, "generate", flags)[0]


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(0.0), {1}),
        (Sampling(top_k=1), {1}),
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_p=0.5), {1, 3}),  # 0.45 alone does not reach it
        (Sampling(top_p=0.4), {1}),
        (Sampling(), {0, 1, 2, 3}),
    ],
)
def test_sampling(sampling, allowed):
    probabilities = torch.tensor([0.15, 0.45, 0.1, 0.3])
    generator = torch.Generator().manual_seed(0)
    drawn = [choose_token(probabilities.log(), sampling, generator) for _ in range(400)]
    assert set(drawn) == allowed
    if len(allowed) > 1:
        share = probabilities[1] / probabilities[sorted(allowed)].sum()
        assert drawn.count(1) / 400 == pytest.approx(float(share), abs=0.08)


def test_temperature_sharpens():
    logits, generator = torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0)
    drawn = [choose_token(logits, Sampling(0.25), generator) for _ in range(400)]
    assert sum(drawn) / 400 == pytest.approx(1 / (1 + math.exp(-4)), abs=0.03)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}):
        with pytest.raises(ConfigError):
            Sampling(**wrong)


@pytest.mark.parametrize(("tokens", "length", "stride"), [(100, 32, 32), (97, 32, 8), (20, 32, 5)])
def test_every_token_but_the_first_is_scored_once(tokens, length, stride):
    scored: list[int] = []
    for window in windows(tokens, length, stride):
        last = window.begin + window.length
        assert last < tokens and window.length <= length
        new = range(window.scored_from, last + 1)
        if window.begin:
            assert new[0] - window.begin > length - stride
        scored += new
    assert scored == list(range(1, tokens))
    with pytest.raises(ConfigError, match="stride"):
        windows(tokens, length, length + 1)
    with pytest.raises(DataError):
        windows(1, length, stride)


@pytest.mark.parametrize("stride", [32, 8])
def test_perplexity_is_that_of_transformers(made, tmp_path, stride):
    """By each window anew through transformers; in two layouts, of a dataset and of a text."""
    tokens = np.fromfile(bin_path(str(made["valid"])), dtype=np.uint16)[:150].astype(np.int64)
    losses = []
    for window in windows(len(tokens), 32, stride):
        piece = torch.from_numpy(tokens[window.begin : window.begin + window.length + 1])
        log_p = load_logits(made["hf"], piece[None, :-1])[0].log_softmax(-1)
        nll = -log_p.gather(1, piece[1:, None])[:, 0]
        losses.append(nll[window.scored_from - window.begin - 1 :])
    wanted = torch.cat(losses)
    assert len(wanted) == 149
    (tmp_path / "text").write_text(" ".join(str(token) for token in tokens))
    common = ["--load", str(made["run"]), "--stride", str(stride), "--micro-batch-size", "2"]
    data = ["--data-path", str(made["valid"]), "--max-tokens", "150"]
    for world, flags in (
        (1, ["--text", str(tmp_path / "text")]),
        (2, [*data, "--tensor-model-parallel-size", "2"]),
        (2, data),
    ):
        output = ["--output", str(tmp_path / "figures.json")]
        printed = dist.run(run, world, "evaluate", [*common, *flags, *output])[0]
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["tokens"] == 149
        assert figures["loss"] == pytest.approx(float(wanted.mean()), abs=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        assert [tensor["rows_24"] for tensor in figures["sparsity"]] == [True] * 4
        assert printed.count("0.5000  yes           yes") == 4, printed
