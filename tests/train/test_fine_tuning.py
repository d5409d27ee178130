"""Fine-tuning on conversations from end to end: losses, masks, layouts, resume, export, answers."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.model import StoredModel
from megasparse.checkpoint.stored_mask import mask_part
from megasparse.data.jsonl import read_texts
from megasparse.data.manifest import PreprocessOptions
from megasparse.data.preprocess import preprocess
from megasparse.data.tokenizers.special_tokens import TokenOptions
from megasparse.data.tokenizers.tokenizer import load_tokenizer
from megasparse.kernels import is_24
from megasparse.sparsity.shard import WeightShard
from megasparse.train.checkpoint import newest_valid
from tests import dist
from tests.chats import conversations, make_tokenizer, message, questions, write_conversations
from tests.runs import LLAMA, train

# 14 samples of 80 tokens with 8 to 24 of answers: a step is an epoch.
MODEL = [
    "--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", *LLAMA,
    "--seq-length", "80", "--make-vocab-size-divisible-by", "16", "--lr", "3e-3",
]  # fmt: skip
BASE = [*MODEL, "--train-iters", "5", "--global-batch-size", "4", "--eval-iters", "0"]
RECIPES = {
    "fst": ["--sparsity-recipe", "fst", "--masked-decay", "1e-3"],
    "s_ste": ["--sparsity-recipe", "s_ste"],
    "ast": ["--sparsity-recipe", "ast", "--slorb-k", "8", "--mask-update-interval", "2"],
}
TUNED = [
    *MODEL, "--train-iters", "4", "--global-batch-size", "14", "--sft", "--eval-iters", "1",
    "--lr-decay-style", "constant",
]  # fmt: skip
# MVUE draws by micro-batch, so that runs with others are not compared number by number.
NO_DRAWS = ["--mvue", "off"]
WEIGHTS = [f"decoder.layers.{n}.mlp.linear_fc{i}.weight" for n in (0, 1) for i in (1, 2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tokenizer, a dataset of texts, one of conversations."""
    folder = tmp_path_factory.mktemp("chat")
    make_tokenizer(folder / "tokenizer")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{q} {a}" * 4}) + "\n" for q, a in questions()))
    chats = write_conversations(folder / "chats.jsonl")
    output = str(folder / "data")
    preprocess(PreprocessOptions((texts,), str(folder / "base"), folder / "tokenizer"))
    preprocess(
        PreprocessOptions((chats,), output, folder / "tokenizer", json_keys=("messages",), sft=True)
    )
    assert len(list(read_texts(texts))) == 20
    return folder


def _base(made: Path, recipe: str) -> str:
    """A sparse model trained on texts, once; without FST's dense tail."""
    folder = made / recipe
    if not folder.is_dir():
        flags = [*BASE, *RECIPES[recipe], "--dense-tail-fraction", "0", "--run-dir", str(folder)]
        flags += ["--tokenizer-model", str(made / "tokenizer"), "--split", "1,0,0"]
        dist.run(train, 1, [*flags, "--data-path", str(made / "base_text_document")])
    return str(folder)


def _tune(made: Path, folder: Path, flags: list[str], world: int = 1):
    """The rows of a fine-tuning."""
    data = str(made / "data_messages_document")
    given = [*TUNED, "--train-data-path", data, "--valid-data-path", data]
    given += ["--tokenizer-model", str(made / "tokenizer"), "--run-dir", str(folder)]
    return dist.run(train, world, [*given, *flags])[0]


def _start(made: Path, recipe: str) -> list[str]:
    return [*RECIPES[recipe], "--load", _base(made, recipe), "--finetune"]


def _stored(folder: Path | str) -> StoredModel:
    return StoredModel(newest_valid(Path(folder) / "checkpoints"), fold=False)


def _masks(stored: StoredModel) -> dict[str, torch.Tensor]:
    shapes = {entry.name: tuple(entry.shape) for entry in stored.entries()}
    return {
        name: mask_part(stored.reader, name, stored.recipe, WeightShard(shapes[name]))
        for name in WEIGHTS
    }


@pytest.fixture(scope="module")
def single(made, tmp_path_factory):
    """FST in one process; its rows and folder."""
    folder = tmp_path_factory.mktemp("single")
    flags = [*_start(made, "fst"), *NO_DRAWS, "--micro-batch-size", "7"]
    return _tune(made, folder, flags), folder


def _alone(rank: int, world: int, folder: str, tokenizer_folder: str) -> tuple[float, int]:
    """Sum and number of the losses of answers, each conversation alone in a dense model."""
    from megasparse.checkpoint.model import open_checkpoint
    from megasparse.data.chat.conversation import Conversation
    from megasparse.data.chat.tokens import ChatEncoder
    from megasparse.data.documents import template_of
    from megasparse.distributed.control_plane import ControlPlane
    from megasparse.inference.loading import load_model

    source = StoredModel(open_checkpoint(Path(folder), ControlPlane(None)))
    model, _ = load_model(source, torch.device("cpu"))
    where = Path(tokenizer_folder)
    tokenizer = load_tokenizer(where, options=TokenOptions(parse_special=True))
    encoder = ChatEncoder(tokenizer, template_of(tokenizer, where, None))
    total, count = 0.0, 0
    for record in conversations():
        ids, answers = encoder.encode(Conversation(record["messages"]))
        tokens = torch.tensor([ids[:-1]])
        positions = torch.arange(tokens.shape[1])[None]
        with torch.no_grad():
            logits = model(tokens, positions, None, runtime_gather_output=True)[0]
        losses = torch.nn.functional.cross_entropy(
            logits[:, : tokenizer.vocab_size].double(), torch.tensor(ids[1:]), reduction="none"
        )
        total += float(losses[torch.tensor(answers[1:])].sum())
        count += sum(answers[1:])
    return total, count


def test_the_loss_is_the_mean_over_answers_of_conversations_alone(made, single):
    rows, folder = single
    start = dist.run(_alone, 1, _base(made, "fst"), str(made / "tokenizer"))[0]
    assert rows[0]["loss"] == pytest.approx(start[0] / start[1], rel=1e-5)
    end = dist.run(_alone, 1, str(folder), str(made / "tokenizer"))[0]
    assert rows[-1]["valid_loss"] == pytest.approx(end[0] / end[1], rel=1e-5)
    assert rows[-1]["valid_loss"] < rows[0]["loss"] - 0.3


LAYOUTS = {
    "dp 2, zero 2": (2, ["--micro-batch-size", "1", "--zero-stage", "2"]),
    "tp 2, sp": (
        2,
        ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--micro-batch-size", "2"],
    ),
    "pp 2": (2, ["--pipeline-model-parallel-size", "2", "--zero-stage", "1"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_micro_batches_give_the_same_losses(made, tmp_path, single, layout):
    world, flags = LAYOUTS[layout]
    rows = _tune(made, tmp_path, [*_start(made, "fst"), *NO_DRAWS, *flags], world)
    for row, one in zip(rows, single[0], strict=True):
        assert row["loss"] == pytest.approx(one["loss"], rel=5e-6), row["step"]
        assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), row["step"]
        assert row["samples"] == one["samples"]
    assert rows[-1]["valid_loss"] == pytest.approx(single[0][-1]["valid_loss"], rel=5e-6)


def test_a_resumed_run_repeats_it(made, tmp_path, single):
    flags = [*_start(made, "fst"), *NO_DRAWS, "--micro-batch-size", "7"]
    _tune(made, tmp_path, [*flags, "--exit-interval", "2"])
    rows = _tune(made, tmp_path, [*flags, "--resume"])
    for row, one in zip(rows, single[0], strict=True):
        names = ("loss", "grad_norm", "samples", "lr", "density")
        assert {n: row[n] for n in names} == {n: one[n] for n in names}
    assert rows[-1]["valid_loss"] == single[0][-1]["valid_loss"]


def test_masks_stay_in_fst(made, single):
    before, after = _stored(_base(made, "fst")), _stored(single[1])
    masks = _masks(after)
    for name, mask in _masks(before).items():
        assert torch.equal(masks[name], mask)
        value = after.read(name)
        assert not value[~mask].any() and not torch.equal(value, before.read(name))
        assert is_24(value) and is_24(value, dim=0)
    assert all(row["sparse"] for row in single[0])  # no dense tail


def test_masks_may_change_if_asked(made, tmp_path, single):
    flags = [*_start(made, "fst"), "--micro-batch-size", "7", "--no-freeze-masks", "--lr", "3e-2"]
    _tune(made, tmp_path, flags)
    before, after = _masks(_stored(_base(made, "fst"))), _masks(_stored(tmp_path))
    assert any(not torch.equal(after[name], mask) for name, mask in before.items())


def test_scales_stay_in_s_ste(made, tmp_path):
    rows = _tune(made, tmp_path, [*_start(made, "s_ste"), "--micro-batch-size", "14"])
    source, folder = Path(_base(made, "s_ste")) / "checkpoints", tmp_path / "checkpoints"
    scales = StoredModel(newest_valid(source), effective=False).frozen_scales()
    assert len(scales) == 4
    assert StoredModel(newest_valid(folder), effective=False).frozen_scales() == scales
    assert all(is_24(_stored(tmp_path).read(name)) for name in WEIGHTS)
    assert rows[-1]["valid_loss"] < rows[0]["loss"]


def test_the_low_rank_branch_goes_on_in_ast(made, tmp_path):
    start = _start(made, "ast")
    rows = _tune(made, tmp_path, [*start, "--micro-batch-size", "14"])
    reference = dist.run(_alone, 1, _base(made, "ast"), str(made / "tokenizer"))[0]
    assert rows[0]["loss"] == pytest.approx(reference[0] / reference[1], rel=1e-5)
    after = _masks(_stored(tmp_path))
    for name, mask in _masks(_stored(_base(made, "ast"))).items():
        assert torch.equal(after[name], mask)
    without = [flag for flag in start if flag not in ("--slorb-k", "8")]
    with pytest.raises(RuntimeError, match="trained with slorb_k 8, this run has none"):
        _tune(made, tmp_path / "without", without)


def _answer(rank: int, world: int, flags: list[str]) -> str:
    from launch import generate

    with redirect_stdout(StringIO()) as printed:
        generate.generate(generate.parse_args(flags))
    return printed.getvalue()


def test_an_exported_model_answers_in_its_template(made, tmp_path):
    """From here as from Hugging Face: the same answer, which was learned."""
    import transformers

    from tools import export_sparse

    flags = ["--micro-batch-size", "14", "--train-iters", "40", "--lr", "1e-2"]
    rows = _tune(made, tmp_path / "run", [*_start(made, "fst"), *flags])
    assert rows[-1]["valid_loss"] < 0.2 * rows[0]["loss"]
    exported = tmp_path / "hf"
    arguments = ["--input", str(tmp_path / "run"), "--output", str(exported)]
    assert export_sparse.main(arguments) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    question, _ = questions()[4]
    ids = tokenizer.apply_chat_template(
        [message("user", question)], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]
    assert int(out[-1]) == tokenizer.eos_token_id
    expected = tokenizer.decode(out[:-1])
    assert expected.startswith("The ")
    asked = ["--chat", "--prompt", question, "--greedy", "--max-new-tokens", "20"]
    for source in (["--load", str(tmp_path / "run")], ["--load-hf", str(exported)]):
        assert dist.run(_answer, 1, [*source, *asked])[0].strip() == expected
    # The exported weights go on, with the masks that their zeros show.
    folder = tmp_path / "again"
    again = [*RECIPES["fst"], "--load-hf", str(exported), "--train-iters", "1"]
    more = _tune(made, folder, [*again, "--micro-batch-size", "14"])
    assert more[0]["loss"] == pytest.approx(rows[-1]["valid_loss"], rel=1e-4)
    first, second = _stored(tmp_path / "run"), _stored(folder)
    for name in WEIGHTS:
        assert not second.read(name)[first.read(name) == 0].any()


REFUSED = {
    "texts": (["--train-data-path", "TEXTS"], "holds texts, expected conversations with --sft"),
    "no weights": ([], "sft fine-tunes given weights: expected load with finetune, or load_hf"),
    "eod": (["--eod-mask-loss"], "eod_mask_loss with sft"),
    "mock": (["--mock-data"], "sft with mock_data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fine_tuned_is_refused(made, tmp_path, name):
    from megasparse.config import load_config, resolve
    from megasparse.errors import MegasparseError
    from megasparse.preflight.settings import check

    flags, expected = REFUSED[name]
    data = ["--train-data-path", str(made / "data_messages_document"), "--eval-iters", "0"]
    given = [*TUNED, *data, "--tokenizer-model", str(made / "tokenizer")]
    given += [flag.replace("TEXTS", str(made / "base_text_document")) for flag in flags]
    if name != "no weights":
        given += ["--load", _base(made, "fst"), "--finetune"]
    with pytest.raises(MegasparseError, match=expected):
        check(resolve(load_config([*given, "--run-dir", str(tmp_path)]), 1))


def test_conversations_are_no_texts(made, tmp_path):
    from megasparse.config import load_config, resolve
    from megasparse.errors import DataError
    from megasparse.preflight.settings import check

    given = [*BASE, "--data-path", str(made / "data_messages_document"), "--run-dir", str(tmp_path)]
    # A tokenizer that parses control tokens, as that of conversations does.
    given += ["--tokenizer-model", str(made / "tokenizer"), "--parse-special"]
    with pytest.raises(DataError, match="holds conversations, expected --sft"):
        check(resolve(load_config(given), 1))


def test_freezing_needs_masks(made, tmp_path):
    from megasparse.config import load_config, resolve
    from megasparse.errors import ConfigError
    from megasparse.preflight.settings import check

    flags = [*MODEL, "--mock-data", "--vocab-size", "64", "--freeze-masks", "--run-dir"]
    flags += [str(tmp_path), "--sparsity-recipe"]
    with pytest.raises(ConfigError, match="freeze_masks: the recipe s_ste has no masks, expected"):
        check(resolve(load_config([*flags, "s_ste"]), 1))
    assert check(resolve(load_config([*flags, "ste"]), 1)).config.sparsity.freeze_masks
