"""What the matrix leaves out: dropout, documents, one micro-batch, BF16, logits, bad numbers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megasparse.errors import NumericsError
from tests import dist
from tests.parallel.layouts import (
    BASE,
    CP2,
    DOCUMENTS_APART,
    FULL,
    GPT,
    LAYOUTS,
    LLAMA_STYLE,
    PP2,
    RICH,
    S_STE,
    SELECTIVE,
    SMALL_VOCABULARY,
    SP,
    TP2,
    WIDE,
    zero,
)  # fmt: skip
from tests.parallel.trace import traced

SHORT = ["--num-layers", "2", "--train-iters", "4", "--eval-iters", "0", "--lr-decay-iters", "20"]


def _losses(tmp_path, dataset, name, world, flags):
    arguments = [*BASE, *SHORT, *flags, "--data-path", dataset, "--run-dir", str(tmp_path / name)]
    return [row["loss"] for row in dist.run(traced, world, arguments)[0]]


DROPOUT = ["--hidden-dropout", "0.2", "--attention-dropout", "0.2"]


@pytest.mark.parametrize(
    ("world", "flags"),
    [(1, []), (2, [*TP2, *SP]), (2, PP2), (2, [*PP2, "--global-batch-size", "16"])],
    ids=["one", "tp 2, sp", "pp 2", "pp 2, 8 micro-batches"],
)
def test_recomputation_repeats_dropout_and_mvue(tmp_path, dataset, world, flags):
    base = [*GPT, *DROPOUT, *flags]
    expected = _losses(tmp_path, dataset, "kept", world, base)
    assert _losses(tmp_path, dataset, "full", world, [*base, *FULL]) == expected
    assert _losses(tmp_path, dataset, "selective", world, [*base, *SELECTIVE]) == expected
    without = _losses(tmp_path, dataset, "no-dropout", world, [*GPT, *flags])
    assert without != expected


@pytest.mark.parametrize(
    "extra",
    [
        ["--global-batch-size", "2"],  # one micro-batch
        DOCUMENTS_APART,
        ["--micro-batch-size", "1"],
    ],
    ids=["one micro-batch", "documents apart", "eight micro-batches"],
)
def test_pipeline_equals_one_process(tmp_path, dataset, extra):
    for style in (GPT, LLAMA_STYLE):
        flags = [*style, *extra]
        one = _losses(tmp_path, dataset, f"one{len(style)}", 1, flags)
        two = _losses(tmp_path, dataset, f"two{len(style)}", 2, [*flags, *PP2, *FULL])
        assert two == pytest.approx(one, rel=2e-6)


WINDOWED = ["--window-size", "5,0", "--window-attn-skip-freq", "2"]


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("dense", [*DOCUMENTS_APART, *WINDOWED]), ("ste", []), ("ast", ["--mask-metric", "wanda"])],
    ids=["dense, documents, windows", "ste", "ast"],
)
def test_context_parallel_equals_one_process(tmp_path, dataset, recipe, more):
    """What the matrix does not have: other recipes, windows, Wanda's figures."""
    flags = [*LLAMA_STYLE, "--sparsity-recipe", recipe, "--masked-decay", "none", *more]
    one = _losses(tmp_path, dataset, "one", 1, flags)
    assert _losses(tmp_path, dataset, "two", 2, [*flags, *CP2]) == pytest.approx(one, rel=2e-6)


@pytest.mark.parametrize("flag", DOCUMENTS_APART[4:])
def test_the_ends_of_documents_are_in_the_data(tmp_path, dataset, flag):
    """Each flag changes the run from its first step: the comparisons above are of something."""
    base = [*GPT, "--train-iters", "1"]
    without = _losses(tmp_path, dataset, "without", 1, [*base, *SMALL_VOCABULARY])
    assert _losses(tmp_path, dataset, "with", 1, [*base, *SMALL_VOCABULARY, flag]) != without


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_replicated_gradients_are_whole_without_clipping_too(tmp_path, dataset, stage):
    flags = [*GPT, "--clip-grad", "0"]
    one = _losses(tmp_path, dataset, "one", 1, flags)
    assert _losses(tmp_path, dataset, "clipped", 1, GPT) != one
    split = _losses(tmp_path, dataset, "split", 2, [*flags, *TP2, *SP, *zero(stage)])
    assert split == pytest.approx(one, rel=2e-6)


@pytest.mark.parametrize("layout", [*RICH, "tp 2, dp 2, zero 2"])
def test_bf16_follows_one_process(tmp_path, dataset, layout):
    """Sums in another order round differently in BF16: 2^-9 a number, less in their mean."""
    world, flags = LAYOUTS[layout]
    if "--zero-stage" not in flags:
        flags = [*flags, *zero(1)]
    base = [*LLAMA_STYLE, *S_STE, "--bf16", *(WIDE if WIDE[0] in flags else [])]
    one = _losses(tmp_path, dataset, "one", 1, base)
    many = _losses(tmp_path, dataset, "many", world, [*base, *flags])
    assert many == pytest.approx(one, rel=1e-3)
    # In FP32 the same run is another one: BF16 was really on.
    assert _losses(tmp_path, dataset, "fp32", 1, [f for f in base if f != "--bf16"]) != one


def _logits(rank, world, flags):
    """Logits of fixed tokens, before any training and after an evaluation of another shape."""
    from megasparse.config import load_config, padded_vocab_size, resolve
    from megasparse.megatron.data.batches import batches, build_data
    from megasparse.megatron.grid import make_grid
    from megasparse.sparsity.run_recipe import recipe_of
    from megasparse.train.build import build_engine
    from megasparse.train.engine.deepspeed import start_process

    config = resolve(load_config(flags), world)
    parallel = config.parallel
    device = start_process(1.0)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    grid = make_grid(
        tp,
        device,
        config.train.seed,
        pipeline_model_parallel_size=pp,
        context_parallel_size=parallel.context_parallel_size,
    )
    data = build_data(config, grid)
    engine = build_engine(config, grid, recipe_of(config), padded_vocab_size(130, config))
    tokens = torch.arange(24).view(2, 12) * 5 % 130
    positions = torch.arange(12).expand(2, 12)
    first = engine.layout.logits(tokens, positions)
    engine.layout.evaluate(batches(data.streams["valid"], config, grid, 0), 3)
    again = engine.layout.logits(tokens, positions)
    assert torch.equal(first, again)
    engine.train_step(batches(data.streams["train"], config, grid, 0))
    trained = engine.layout.logits(tokens, positions)
    assert not torch.equal(first, trained)
    if parallel.zero_stage == 3:  # between uses no rank has a whole matrix
        matrices = [p for p in engine.model.parameters() if len(p.ds_shape) == 2]
        assert matrices and all(p.numel() == 0 and p.ds_tensor.numel() > 0 for p in matrices)
    return torch.stack([first, trained]).tolist()


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_logits_do_not_depend_on_the_layout(dataset, style):
    base = [*BASE, *(GPT if style == "gpt" else LLAMA_STYLE), "--data-path", dataset]
    (one,) = dist.run(_logits, 1, base)
    assert torch.tensor(one).shape == (2, 2, 12, 144)
    for world, flags in (
        (2, PP2),
        (2, [*TP2, *SP]),
        (4, [*TP2, *SP, *PP2]),
        (2, zero(3)),
        (4, [*CP2, *PP2]),
    ):
        for answer in dist.run(_logits, world, [*base, *flags]):
            torch.testing.assert_close(torch.tensor(answer), torch.tensor(one), atol=1e-5, rtol=0)


def _sampled(rank, world, flags):
    """A whole run with its report: the sample of the model and the report's rows, on rank 0."""
    from megasparse.config import load_config, resolve
    from megasparse.train import main, report

    seen = []

    def keep(step, rows, tensors, recipe, places, sample):
        seen.append((step, sample, [(t.name, t.density, t.rows_24) for t in tensors]))
        return ""

    with mock.patch.object(report, "format_report", keep):
        main.pretrain(resolve(load_config(flags), world))
    return seen


def test_sample_and_report_of_a_pipeline(tmp_path):
    base = [
        *BASE,
        *LLAMA_STYLE,
        *SHORT,
        "--num-layers",
        "4",
        "--mock-data",
        "--sample-tokens",
        "5",
        "--sample-prompt",
        "3 4 5",
        "--run-dir",
    ]
    ((step, sample, tensors),) = dist.run(_sampled, 1, [*base, str(tmp_path / "one")])[0]
    assert step == 4 and sample and len(tensors) == 8
    for name, flags in (("pp", PP2), ("tp", TP2), ("zero", zero(3))):
        first, second = dist.run(_sampled, 2, [*base, str(tmp_path / name), *flags])
        assert second == []
        assert first[0][:2] == (step, sample)
        # Stages write one after the other: layers are in order.
        assert [t[0] for t in first[0][2]] == [t[0] for t in tensors]
        assert all(rows_24 and density == 0.5 for _, density, rows_24 in first[0][2])


def _poisoned_run(rank, world, flags, where):
    """A run that gets an infinity into one rank's gradient; what the engine did about it."""
    from megasparse.config import load_config, resolve
    from megasparse.train import loop, main

    kept = []

    class Trainer(loop.Trainer):
        def _step(self, stream):
            if self.controller.clock.step == 2:
                self.poison = rank == where
            parameters = dict(self.engine.model.named_parameters())
            before = {name: p.detach().clone() for name, p in parameters.items()}
            try:
                return super()._step(stream)
            except NumericsError:
                kept.append(all(torch.equal(before[n], p) for n, p in parameters.items()))
                raise

        def __init__(self, *args):
            super().__init__(*args)
            self.poison = False
            first = next(p for p in self.engine.model.parameters() if p.dim() == 2)
            first.register_hook(lambda g: g + float("inf") if self.poison else g)

    with mock.patch.object(main, "Trainer", Trainer):
        try:
            main.pretrain(resolve(load_config(flags), world))
        except NumericsError as error:
            return kept, str(error)
    return kept, None


@pytest.mark.parametrize(
    ("world", "flags"),
    [(1, []), (1, zero(1)), (2, PP2), (2, [*PP2, *zero(1)]), (2, [*TP2, *zero(2)])],
    ids=["one", "zero 1", "pp 2", "pp 2, zero 1", "tp 2, zero 2"],
)
def test_no_rank_updates_on_an_infinite_gradient(tmp_path, dataset, world, flags):
    arguments = [*BASE, *GPT, *flags, *SHORT, "--data-path", dataset]
    arguments += ["--run-dir", str(tmp_path / "run")]
    for kept, error in dist.run(_poisoned_run, world, arguments, world - 1):
        assert kept == [True]
        assert error is not None and "step 3" in error and "no update was made" in error
