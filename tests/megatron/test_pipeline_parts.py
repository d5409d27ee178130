"""The parts of a model and how they are called: names, ties, masks, and who is told what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.megatron import calibrate, loss
from megasparse.megatron import pipeline as module
from megasparse.megatron.distillation import vocab_parallel_kl
from megasparse.megatron.pipeline import (
    EmbeddingPart,
    LayerPart,
    NormPart,
    OutputPart,
    part_specs,
    stage_bounds,
    whole_model_view,
)
from megasparse.sparsity.clock import Clock
from tests.runs import LLAMA, TINY


def _config(*flags: str, world: int = 1) -> Any:
    return resolve(load_config([*TINY, "--mock-data", "--num-layers", "6", *flags]), world)


@pytest.mark.parametrize(
    ("stages", "bounds"),
    [(1, [0, 9]), (2, [0, 4, 9]), (3, [0, 3, 5, 9]), (6, [0, 2, 3, 4, 5, 6, 9])],
)
def test_the_ends_have_embedding_norm_and_output_too(stages, bounds):
    flags = ["--pipeline-model-parallel-size", str(stages), "--global-batch-size", "12"]
    assert stage_bounds(_config(*flags, world=stages)) == bounds


def _specs(*flags: str) -> list[Any]:
    grid: Any = SimpleNamespace(device=torch.device("cpu"))
    return part_specs(_config(*flags), grid, 144, Clock(1, 10))


def test_parts_of_a_model_with_tied_embeddings():
    flags = ["--recompute-granularity", "full", "--recompute-method", "block"]
    first, *body, norm, last = _specs(*flags, "--recompute-num-layers", "2")
    assert first.kind is last.kind is EmbeddingPart and norm.kind is NormPart
    assert first.tied == last.tied == "embedding"
    assert first.tied_weight == last.tied_weight == "embedding.word_embeddings.weight"
    assert first.forward is None and last.forward is EmbeddingPart.logits
    assert first.options["position_embedding_type"] == "learned_absolute"
    assert last.options["position_embedding_type"] == "none"
    assert first.options["vocab_size"] == last.options["vocab_size"] == 144
    assert [part.options["number"] for part in body] == list(range(6))
    assert [part.options["recompute"] for part in body] == [True, True, *[False] * 4]
    assert all(part.kind is LayerPart and part.options["rotary"] is None for part in body)
    assert all(part.tied is None and part.forward is None for part in [*body, norm])


def test_parts_of_a_model_with_an_output_layer_and_experts(monkeypatch):
    monkeypatch.setattr(module, "RotaryEmbedding", lambda **options: options)
    experts = [
        "--num-experts",
        "4",
        "--moe-layer-freq",
        "[0,1,0,1,0,0]",
        "--moe-ffn-hidden-size",
        "32",
        "--rotary-percent",
        "0.5",
    ]
    first, *body, _, last = _specs(*LLAMA, *experts)
    assert last.kind is OutputPart and first.tied is last.tied is None
    rotary = body[0].options["rotary"]
    assert all(part.options["rotary"] is rotary for part in body)
    assert rotary["use_cpu_initialization"] is True and rotary["rotary_percent"] == 0.5
    kinds = ["MoELayer" in str(part.options["spec"].submodules.mlp) for part in body]
    assert kinds == [False, True, False, True, False, False]


def test_a_stage_has_the_names_of_the_whole_model():
    parts = []
    for path in ("embedding", "decoder.layers.3", "decoder.layers.4", "output_layer"):
        one = torch.nn.Linear(2, 2, bias=False)
        parts.append(SimpleNamespace(canonical=lambda path=path, one=one: {path: one}))
    names = [name for name, _ in whole_model_view(parts).named_parameters()]
    assert sorted(names) == sorted(
        [
            "embedding.weight",
            "decoder.layers.3.weight",
            "decoder.layers.4.weight",
            "output_layer.weight",
        ]
    )
    layer: Any = LayerPart.__new__(LayerPart)
    torch.nn.Module.__init__(layer)
    layer._number, layer.layer = 5, "layer"
    assert layer.canonical() == {"decoder.layers.5": "layer"}


class Output(torch.nn.Module):
    """Notes how an output layer is built and called."""

    made: list[tuple[Any, Any]] = []

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__()
        self.made.append((sizes, options))

    def forward(self, hidden: Any, weight: Any = None) -> Any:
        return (hidden, weight), None


class Embedding(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.word_embeddings = SimpleNamespace(weight="words")

    def forward(self, input_ids: Any, position_ids: Any) -> Any:
        return input_ids * 100 + position_ids


def test_logits_are_made_with_the_words_or_with_weights_of_their_own(monkeypatch):
    monkeypatch.setattr(module, "ColumnParallelLinear", Output)
    monkeypatch.setattr(module, "LanguageModelEmbedding", Embedding)
    config: Any = SimpleNamespace(hidden_size=8, init_method="init")
    Output.made = []
    tied, own = EmbeddingPart(config, 144, 32, "none"), OutputPart(config, 144)
    allocates = [options.pop("skip_weight_param_allocation") for _, options in Output.made]
    assert allocates == [True, False]
    assert (
        Output.made
        == [
            (
                (8, 144),
                {
                    "config": config,
                    "init_method": "init",
                    "bias": False,
                    "skip_bias_add": False,
                    "gather_output": False,
                },
            )
        ]
        * 2
    )
    assert tied.logits("hidden") == ("hidden", "words")  # type: ignore[arg-type]
    assert own("hidden") == ("hidden", None)
    assert tied.canonical() == {"embedding": tied.embedding}
    assert own.canonical() == {"output_layer": own.output_layer}
    tokens, positions = torch.tensor([[3]]), torch.tensor([[7]])
    assert int(tied([tokens, positions])) == 307
    mask = torch.tensor([True, False])
    hidden, given = tied([tokens, positions, mask])
    assert int(hidden) == 307 and given.dtype == torch.uint8 and given.tolist() == [1, 0]


def test_a_layer_knows_its_number_and_the_final_norm_its_epsilon(monkeypatch):
    built: list[Any] = []
    monkeypatch.setattr(module, "build_module", lambda spec, **how: built.append(how) or Output())
    config: Any = SimpleNamespace(hidden_size=8, layernorm_epsilon=1e-3)
    LayerPart(config, None, 4, None, Clock(1, 10), False)  # type: ignore[arg-type]
    assert built == [{"config": config, "layer_number": 5}]
    norm: Any = SimpleNamespace(layer_norm=lambda: lambda *sizes: lambda x: (sizes, x))
    part = NormPart.__new__(NormPart)
    torch.nn.Module.__init__(part)
    NormPart.__init__(part, config, norm)
    assert part("h") == part(("h", "mask")) == ((config, 8, 1e-3), "h")  # type: ignore[arg-type]
    assert part.canonical() == {"decoder.final_layernorm": part.norm}


@pytest.mark.parametrize("divisor", [None, 4.0])
def test_a_loss_is_divided_by_what_it_is_told(monkeypatch, divisor):
    monkeypatch.setattr(module, "token_cross_entropy", lambda logits, targets: logits[..., 0])
    logits = torch.arange(1.0, 7.0).view(3, 2, 1)  # (S, B, V)
    mask = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    more = () if divisor is None else (torch.tensor(divisor),)
    found = module.vocab_parallel_loss(logits, (torch.zeros(2, 3), mask, *more))
    assert float(found) == pytest.approx((1 + 5 + 6) / (divisor or 3))
    nothing = module.vocab_parallel_loss(logits, (torch.zeros(2, 3), mask * 0, *more))
    assert float(nothing) == 0.0


def test_logits_are_gathered_batch_first(monkeypatch):
    region = "gather_from_tensor_model_parallel_region"
    monkeypatch.setattr(module.tensor_parallel, region, lambda part: torch.cat([part, part], -1))
    part = torch.randn(3, 2, 4)
    found = module.gather_logits(part)
    assert torch.equal(found, torch.cat([part, part], -1).transpose(0, 1)) and found.is_contiguous()


@pytest.mark.parametrize("there", [False, True])
def test_16_bit_losses_on_gpus_are_transformer_engines(monkeypatch, there):
    monkeypatch.setattr(loss, "te_parallel_cross_entropy", object() if there else None)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert loss.fused(gpu, torch.bfloat16) is there
    assert not loss.fused(cpu, torch.bfloat16) and not loss.fused(gpu, torch.float32)


@pytest.mark.parametrize("temperature", [None, 1.0, 3.0])
@pytest.mark.parametrize("vocab", [None, 5, 7])
def test_a_divergence_on_one_rank_has_the_gradient_of_its_definition(temperature, vocab):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 2, 7, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 2, 7, generator=generator, dtype=torch.float64)
    upstream = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    more = {} if temperature is None else {"temperature": temperature}
    kl = vocab_parallel_kl(student, teacher, vocab_size=vocab, **more)
    (found,) = torch.autograd.grad((kl * upstream).sum(), student)
    t = temperature or 1.0
    p, q = (torch.log_softmax(x[..., :vocab] / t, -1) for x in (teacher, student))
    expected = t**2 * (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(kl, expected)
    (gradient,) = torch.autograd.grad((expected * upstream).sum(), student)
    torch.testing.assert_close(found, gradient)
    low = vocab_parallel_kl(student.detach().bfloat16(), teacher.bfloat16(), vocab_size=vocab)
    assert low.dtype == torch.float32 and low.shape == (3, 2)


class Layer(torch.nn.Module):
    """`h + weight h`, a step further for each that was changed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.eye_(self.inner.weight)

    def forward(self, hidden_states: torch.Tensor, extra: Any = None) -> tuple[torch.Tensor, None]:
        return hidden_states + self.inner(hidden_states), None


def test_calibration_runs_each_layer_on_what_the_changed_ones_give(monkeypatch):
    monkeypatch.setattr(calibrate, "ParallelLinear", torch.nn.Linear)
    reached: list[str] = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = torch.nn.Module()
            self.decoder.layers = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, tokens: Any, positions: Any, mask: Any) -> None:
            self.decoder.layers[0](hidden_states=tokens.float(), extra=mask)
            reached.append("behind the first layer")

    model: Any = Model()
    seen: list[tuple[str, list[float], int]] = []

    def change(name: str, layer: Any, inputs: Any) -> None:
        (one,) = inputs.values()
        seen.append((name, one.square.tolist(), one.tokens))
        assert one.gram is not None and list(inputs) == ["inner"]
        with torch.no_grad():
            layer.inner.weight.mul_(2)

    batches = [
        {"tokens": torch.tensor([[1, 2]]), "position_ids": None},
        {"tokens": torch.tensor([[3, 4]]), "position_ids": None},
    ]
    calibrate.calibrate_layers(model, batches, change, gram=True)
    assert not reached  # the rest of the model is not computed
    # Of the second layer what the changed first one gives: h + 2 h.
    assert seen == [
        ("decoder.layers.0", [1.0 + 9, 4.0 + 16], 2),
        ("decoder.layers.1", [90.0, 180.0], 2),
    ]
    model(**{"tokens": torch.ones(1, 2), "positions": None, "mask": None})
    assert reached and len(seen) == 2  # no hook is left
    assert not model.decoder.layers[0].inner._forward_pre_hooks
