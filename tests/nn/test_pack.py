"""Packed linears give the dense model's numbers, and transformers generates with them."""

from __future__ import annotations

import pytest
import torch

from megasparse.errors import ConfigError
from megasparse.kernels import prune24_mask
from megasparse.nn import pack_, unpack_
from megasparse.nn.pack import Choices, PackedLinear
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
    times, asked = {True: 1.0, False: 2.0}, []

    class Clock:
        def choose(self, key, flops, sparse, dense, least):
            asked.append(key)
            torch.testing.assert_close(sparse(0), dense(), atol=0.1, rtol=0.1)
            return Choice(3 if "T 1," in key else 0, 0.5, 1.0)

    def milliseconds(run):
        run()
        return times[run.__code__.co_names == ("dense_linear",)]

    monkeypatch.setattr("megasparse.nn.pack.milliseconds", milliseconds)
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

    def whole(x_TK, bias, algorithm):
        ran.append(algorithm)
        return expected[: x_TK.shape[0]]

    monkeypatch.setattr(operands, "whole", whole)
    monkeypatch.setattr(operands, "product", lambda x, b: lambda a: expected[: x.shape[0]])
    layer(x[:1])
    assert len(asked) == 2 and ran[-1] == 3


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
