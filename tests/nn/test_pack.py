"""Packed linears give the dense model's numbers, and transformers generates with them."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.kernels import prune24_mask
from megasparse.nn import pack_, packed_operands, unpack_
from megasparse.nn.pack import PackedLinear
from megasparse.nn.packed_choice import Choices, WholePasses
from megasparse.sparsity.gemms.choice import Choice

LLAMA = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _pruned(model, *names):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (not names or name in names):
            weight = module.weight.data
            weight.masked_fill_(~prune24_mask(weight), 0.0)
    return model.requires_grad_(False)


def _model(device="cpu", dtype=torch.bfloat16):
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 128, bias=False)
    )
    return _pruned(model.to(device, dtype))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_packed_products_are_the_dense_ones(fp8):
    model = _model()
    x = torch.randn(3, 5, 128, dtype=torch.bfloat16)
    expected, kept = model(x), {n: p.clone() for n, p in model.state_dict().items()}
    report = pack_(model, fp8)
    assert report.packed == ["0", "2"] and not report.left
    assert report.bytes_added == sum(
        256 * 128 * (1 if fp8 else 2) // 2 + 256 * 128 // 8 for _ in range(2)
    )
    z = model(x)
    assert z.shape == expected.shape and z.dtype == expected.dtype
    error = (z - expected).float().norm() / expected.float().norm()
    assert error < (0.08 if fp8 else 0.01) and (not fp8 or error > 0.01)
    torch.testing.assert_close(model[0](x[0, 0]), model[0](x)[0, 0], atol=0.1, rtol=0.1)
    assert model(x[:0]).shape == (0, 5, 128)
    assert all(torch.equal(p, kept[n]) for n, p in model.state_dict().items())
    with pytest.raises(RuntimeError, match="no gradients"):
        model(x.requires_grad_())
    assert unpack_(model) == 2 and torch.equal(model(x.detach()), expected)


def test_what_cannot_be_packed_is_left_with_the_reason():
    model = _model()
    model.add_module("3", torch.nn.Linear(128, 64).bfloat16())  # dense
    model.add_module("4", _pruned(torch.nn.Linear(64, 48).bfloat16()))
    model.add_module("5", _pruned(torch.nn.Linear(64, 64)))
    report = pack_(model, layers=["[0345]"])
    assert report.packed == ["0"]
    assert report.left["3"] == "is not 2:4" and "float32" in report.left["5"]
    assert report.left["4"] == "has shape (48, 64), expected multiples of (64, 64)"
    for bad, message in ((["3"], "3: is not 2:4"), (["x"], "no linear has such a name")):
        with pytest.raises(ConfigError, match=message):
            pack_(model, layers=bad)
    assert isinstance(model[0], PackedLinear) and type(model[2]) is torch.nn.Linear


def test_a_shape_is_dense_where_that_is_faster(monkeypatch):
    """By clocks that say so: one bucket of tokens is measured once, the whole path counts."""
    times, asked = {True: 1.0, False: 0.99}, []  # as fast, but for noise

    class Clock:
        def choose(self, key, flops, sparse, dense, least):
            asked.append(key)
            torch.testing.assert_close(sparse(0), dense(), atol=0.1, rtol=0.1)
            return Choice(3 if "T 1," in key else 0, 0.5, 1.0)

    def milliseconds(run):
        run()
        return times[run.__name__ == "dense"], 0.1

    monkeypatch.setattr("megasparse.nn.packed_choice.milliseconds", milliseconds)
    model = _model()
    pack_(model)
    layer = model[0]
    layer.__dict__["_choices"] = Choices(Clock())
    x = torch.randn(40, 128, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)  # dense
    assert torch.equal(layer(x[:33]), expected[:33]) and len(asked) == 1  # of the same bucket
    times[False], ran = 0.5, []
    operands = layer.__dict__["_operands"]

    def whole(x, bias, algorithm):
        ran.append(algorithm)
        return expected[: x.shape[0]]

    monkeypatch.setattr(operands, "whole", whole)
    monkeypatch.setattr(operands, "product", lambda x, b: lambda a: expected[: x.shape[0]])
    layer(x[:1])
    assert len(asked) == 2 and ran[-1] == 3


def test_a_model_is_dense_where_its_passes_are_faster(monkeypatch):
    """Packed and dense passes are timed in turn, by a clock that says which one is faster."""
    cost, clock, late = {True: 1.0, False: 2.0}, [0.0], [False]

    class Event:
        def __init__(self):
            self.at = clock[0]

        def query(self):
            return not late[0]

        def elapsed_time(self, end):
            return end.at - self.at

    model = _model()
    pack_(model)
    monkeypatch.setattr(WholePasses, "_now", staticmethod(Event))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choices = model[0].__dict__["_choices"]
    passes, ran = WholePasses(model, choices), []
    for layer in (model[0], model[2]):
        layer.__dict__["_passes"] = passes

    def work(module, args, output):
        ran.append(passes.packed(99))  # later linears ask too; the first one's tokens count
        clock[0] += cost[ran[-1]]

    model[2].register_forward_hook(work)

    def run(tokens, times):
        ran.clear()
        for _ in range(times):
            model(torch.zeros(tokens, 128, dtype=torch.bfloat16))
        return ran

    assert run(3, 8) == [True, False, True, False, True, False, True, True]
    cost[True] = 1.97  # as fast, but for noise
    assert run(40, 8) == [True, False, True, False, True, False, False, False]
    assert run(64, 2) == [False, False] and run(3, 1) == [True]  # of the same bucket; another
    late[0] = True  # nobody waits for the device
    assert run(2, 8) == [True, False] * 4
    late[0] = False
    assert run(2, 1) == [False]
    model[1].register_forward_hook(lambda *_: setattr(choices, "measured", choices.measured + 1))
    assert run(1, 4) == [True] * 4  # a pass in which shapes are measured does not count
    assert passes.packed(1) and unpack_(model) == 2
    assert not model._forward_pre_hooks


def test_linears_that_share_an_input_cast_it_once(monkeypatch):
    cast = []
    quantize = packed_operands.quantize_rows
    monkeypatch.setattr(
        packed_operands, "quantize_rows", lambda x: cast.append(x.shape) or quantize(x)
    )
    model = torch.nn.ModuleList(torch.nn.Linear(128, 64, dtype=torch.bfloat16) for _ in range(3))
    _pruned(model)
    pack_(model, fp8=True)
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    first = [layer(x) for layer in model]
    assert cast == [(6, 128)]
    expected = model[0](2 * x)
    x.mul_(2)  # another x now
    assert torch.equal(model[0](x), expected) and not torch.equal(expected, first[0])
    assert len(cast) == 3
    model[0](x.clone())
    model[0](x)
    assert len(cast) == 5
    with torch.inference_mode():
        x = torch.randn(3, 128, dtype=torch.bfloat16)
        model[0](x)
        model[0](x)
    assert len(cast) == 7  # nothing tells whether an inference tensor was written to


def test_a_token_has_the_same_numbers_in_any_company():
    model = _pruned(torch.nn.Sequential(torch.nn.Linear(128, 64, dtype=torch.bfloat16)))
    pack_(model, fp8=True)
    x = torch.randn(5, 128, dtype=torch.bfloat16) * torch.logspace(-4, 4, 5)[:, None].bfloat16()
    z = model(x)
    for n in range(5):
        torch.testing.assert_close(model(x[n : n + 1])[0], z[n], rtol=2**-7, atol=0)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_transformers_generates(fp8):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(**LLAMA)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    _pruned(model, *[name for name in names if name != "lm_head"])
    prompt = torch.randint(0, 96, (2, 7))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model(prompt).logits
    report = pack_(model, fp8)
    assert len(report.packed) == 14 and set(report.left) == {"lm_head"}
    logits = model(prompt).logits
    assert (logits - expected).float().norm() / expected.float().norm() < (0.2 if fp8 else 0.02)
    tokens = model.generate(prompt, **settings)
    assert tokens.shape == (2, 12) and torch.equal(tokens[:, :7], prompt)
    again = model(tokens[:, :-1]).logits[:, 6:].argmax(-1)
    assert (again == tokens[:, 7:]).float().mean() > 0.5  # a cache, and sums in another order


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_packed_products_on_a_gpu(fp8):
    model = _model("cuda")
    with torch.no_grad():
        for tokens in (1, 7, 64, 300):
            x = torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16)
            unpack_(model)
            expected = model(x)
            pack_(model, fp8)
            error = (model(x) - expected).float().norm() / expected.float().norm()
            assert error < (0.08 if fp8 else 0.01), tokens
