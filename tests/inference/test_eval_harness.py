"""Tasks of lm-evaluation-harness in a run: every layout gives the answers of a plain reference."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.data.tokenizers.tokenizer import load_tokenizer, train_sentencepiece
from megasparse.distributed.control_plane import make_control_plane
from megasparse.errors import ConfigError
from megasparse.inference.eval_harness import HarnessTasks, run_tasks
from megasparse.inference.request_scoring import Interrupted, RequestScorer
from megasparse.megatron.grid import make_grid
from tests import dist
from tests.runs import TINY, make_dataset, train

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.tasks import TaskManager

SAMPLE = ["the cat sat on the mat and the dog ran", "def f(x):\n    return x  # cafe", "aaaa abab"]
QUESTIONS = [
    {"question": "the cat sat on the", "choices": [" mat", " dog and the cat", "x"], "answer": 0},
    {"question": "def f(x):\n    return", "choices": [" x", " the mat"], "answer": 1},
    {"question": "", "choices": ["the cat", "aaaa"], "answer": 0},
]
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
PERPLEXITY = """
task: tiny_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
"""
TEXT = """
task: tiny_text
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 3}
metric_list: [{metric: exact_match}]
"""
NAMES = ["tiny_choice", "tiny_perplexity", "tiny_text"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with tasks, their questions, a tokenizer and a dataset."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "tasks").mkdir()
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in zip(NAMES, (CHOICE, PERPLEXITY, TEXT), strict=True):
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {questions}}}}}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(text + data + "test_split: test\n")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(SAMPLE * 3, 330))
    make_dataset(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def _table_model(vocab_size: int):
    """Logits that follow from the last token alone, so that a sum over a table is the reference."""
    table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0))
    return table, lambda tokens, positions: table[tokens]


def _reference(table, context, continuation, max_length):
    whole = (context + continuation)[-(max_length + 1) :]
    rows = table.double().log_softmax(-1)
    pairs = list(zip(whole, whole[1:]))[-len(continuation) :]
    greedy = all(int(table[before].argmax()) == after for before, after in pairs)
    return sum(float(rows[before, after]) for before, after in pairs), greedy


def _scorer(table, logits_of, control, grid, tokenizer, **more) -> RequestScorer:
    return RequestScorer(
        control, grid, logits_of, tokenizer.decode, tokenizer.eod, 24, 2, pad_to=8, **more
    )


def _unit(rank, world, folder):
    """Every rank: direct requests, tasks, and an interruption at the second batch."""
    grid, control = make_grid(1, torch.device("cpu"), 0), make_control_plane()
    tokenizer = load_tokenizer(folder / "tokenizer.model", probe=False)
    table, logits_of = _table_model(tokenizer.vocab_size)
    scorer = _scorer(table, logits_of, control, grid, tokenizer)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, tokenizer.vocab_size, (7, 40), generator=generator).tolist()
    pairs = [(row[: 3 * n + 1], row[3 * n + 1 : 5 * n + 1]) for n, row in enumerate(ids)]
    pairs.append(([ids[0][0]], [int(table[ids[0][0]].argmax())]))
    answers = None
    if rank == 0:
        answers = scorer.log_likelihoods(pairs)
        scorer.done(None)
    else:
        scorer.serve()
    tasks = HarnessTasks(NAMES, folder / "tasks") if rank == 0 else None
    results = [run_tasks(tasks, scorer, tokenizer) for _ in range(2)]
    stopped = _scorer(
        table, logits_of, control, grid, tokenizer, before_batch=lambda number: number == 1
    )
    with pytest.raises(Interrupted):
        run_tasks(tasks, stopped, tokenizer)
    if rank == 0:
        expected = [_reference(table, *pair, 24) for pair in pairs]
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
        assert [v for v, _ in answers] == pytest.approx([v for v, _ in expected], abs=1e-4)
        assert answers[-1][1] and answers[0] == (0.0, True)
    return results


def test_answers_are_those_of_a_plain_reference_and_copies_share_them(made):
    every = [result for of_rank in dist.run(_unit, 2, made) for result in of_rank]
    first = every[0]  # of two evaluations on each of two ranks
    assert every == [first] * 4
    tokenizer = load_tokenizer(made / "tokenizer.model", probe=False)
    table, _ = _table_model(tokenizer.vocab_size)
    right, right_by_length, bits, texts = 0, 0, 0.0, 0
    size = 0
    for row in QUESTIONS:
        prompt = tokenizer.encode(row["question"]) or [tokenizer.eod]
        scores = [
            _reference(table, prompt, tokenizer.encode(choice), 24)[0] for choice in row["choices"]
        ]
        right += scores.index(max(scores)) == row["answer"]
        by_length = [s / len(c) for s, c in zip(scores, row["choices"], strict=True)]
        right_by_length += by_length.index(max(by_length)) == row["answer"]
        whole = row["question"] + row["choices"][0]
        size += len(whole.encode())
        text = tokenizer.encode(whole)
        for begin_at in range(0, len(text), 24):
            window = text[begin_at : begin_at + 24]
            before = [tokenizer.eod] if begin_at == 0 else [text[begin_at - 1]]
            bits -= _reference(table, before, window, 24)[0] / math.log(2)
        written, token = "", prompt[-1]
        for _ in range(3):
            token = int(table[token].argmax())
            if token == tokenizer.eod:
                break
            written = tokenizer.decode([*tokenizer.encode(written), token])
        texts += written.split("e")[0] == row["choices"][row["answer"]]
    assert first["tiny_choice/acc"] == pytest.approx(right / 3)
    assert first["tiny_choice/acc_norm"] == pytest.approx(right_by_length / 3)
    assert first["tiny_perplexity/bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    assert first["tiny_text/exact_match"] == pytest.approx(texts / 3)


def _runs(rank, world, several):
    return [train(rank, world, flags) for flags in several]


def test_a_run_with_tasks_and_samples_is_the_run_without_in_every_layout(made, tmp_path):
    flags = [*TINY, "--train-iters", "4", "--data-path", str(made / "data"), "--eval-iters", "1"]
    flags += [
        "--vocab-size",
        "330",
        "--eval-interval",
        "3",
        "--tokenizer-model",
        str(made / "tokenizer.model"),
    ]
    looks = ["--eval-harness-tasks", *NAMES, "--eval-harness-include-path", str(made / "tasks")]
    looks += ["--eval-harness-interval", "2", "--sample-interval", "2", "--sample-tokens", "3"]
    looks += ["--sample-prompt", "the cat", ""]
    layouts = {
        "tp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
        "pp": ["--pipeline-model-parallel-size", "2"],
        "dp": ["--zero-stage", "3"],
    }
    runs = [[*flags, "--run-dir", str(tmp_path / "plain")]] + [
        [*flags, *looks, *layout, "--run-dir", str(tmp_path / name)]
        for name, layout in layouts.items()
    ]
    plain, *others = dist.run(_runs, 2, runs)[0]
    assert [row["valid_loss"] for row in plain if "valid_loss" in row]
    for name, rows in zip(layouts, others, strict=True):
        assert [row["step"] for row in rows if "tasks" in row] == [2, 4]
        for row, reference in zip(rows, plain, strict=True):
            assert row["loss"] == pytest.approx(reference["loss"], abs=1e-5)
            first = others[0][row["step"] - 1].get("tasks")
            assert row.get("tasks") == (first and pytest.approx(first, rel=1e-3))
        texts = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in texts]
        assert [(s["step"], s["prompt"]) for s in samples] == [
            (step, prompt) for step in (2, 4) for prompt in ("the cat", "")
        ]
        assert samples[0]["text"].startswith("the cat")
    # The layout that the plain run has: the same bits.
    assert [row["loss"] for row in others[2]] == [row["loss"] for row in plain]


def test_what_cannot_be_evaluated_is_told_before_the_first_step(made, monkeypatch):
    # Without the list of lm-eval's own tasks, which takes seconds.
    small = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", small)
    with pytest.raises(ConfigError, match="lm-eval knows no other; .*lm_eval ls tasks"):
        HarnessTasks(["tiny_choice", "other"], made / "tasks")
    broken = CHOICE.replace("tiny_choice", "broken") + "dataset_path: json\n"
    broken += "dataset_kwargs: {data_files: {test: /nowhere.jsonl}}\ntest_split: test\n"
    (made / "tasks" / "broken.yaml").write_text(broken)
    with pytest.raises(ConfigError, match="eval_harness_tasks: cannot load broken: .*nowhere"):
        HarnessTasks(["broken"], made / "tasks")
    config = load_config([*TINY, "--mock-data", "--eval-harness-tasks", "x"])
    with pytest.raises(ConfigError, match="eval_harness_tasks is set without tokenizer_model"):
        resolve(config, 1)
