"""The FFN's activations: each is reached by its flag, trains sparse, and is exported or refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests import dist
from tests.runs import LLAMA, TINY, train
from tools import convert_checkpoint, export_sparse

ROPE = [flag for flag in LLAMA if flag != "--swiglu"]
FLAGS = {
    "gelu": [],
    "swiglu": LLAMA,
    "geglu": [*ROPE, "--geglu"],
    "squared_relu": [*ROPE, "--squared-relu"],
}
FORMULAS = {
    "gelu": lambda a: functional.gelu(a, approximate="tanh"),
    "swiglu": lambda a: functional.silu(a.chunk(2, -1)[0]) * a.chunk(2, -1)[1],
    "geglu": lambda a: functional.gelu(a.chunk(2, -1)[0], approximate="tanh") * a.chunk(2, -1)[1],
    "squared_relu": lambda a: functional.relu(a).square(),
}


def _ffn(rank, world, flags):
    """Input, weights and output of the first layer's FFN, and the gradient of the input."""
    from megasparse.config import load_config, padded_vocab_size, resolve
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.model import build_model

    config = resolve(load_config([*flags, "--mock-data"]), world)
    grid = make_grid(1, torch.device("cpu"), 1)
    mlp = build_model(config, grid, padded_vocab_size(128, config)).decoder.layers[0].mlp
    x = torch.randn(5, 2, config.model.hidden_size, requires_grad=True)
    y, _ = mlp(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    weights = [mlp.linear_fc1.weight.detach(), mlp.linear_fc2.weight.detach()]
    return x.detach(), *weights, y.detach(), gradient


@pytest.mark.parametrize("name", FLAGS)
def test_the_ffn_computes_its_formula(name):
    ((x, fc1, fc2, y, gradient),) = dist.run(_ffn, 1, [*TINY, *FLAGS[name]])
    x.requires_grad_()
    expected = FORMULAS[name](x @ fc1.t()) @ fc2.t()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-6)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["geglu", "squared_relu"])
def test_it_trains_sparse_and_no_export_mistakes_it(tmp_path, dataset, capsys, name):
    flags = [*TINY, "--lr", "1e-2", "--train-iters", "30", *FLAGS[name]]
    flags += ["--tensor-model-parallel-size", "2", "--data-path", dataset]
    rows = dist.run(train, 2, [*flags, "--run-dir", str(tmp_path / "run")])[0]
    first, last = (sum(row["loss"] for row in rows[s]) / 5 for s in (slice(0, 5), slice(-5, None)))
    assert last < first - 0.5, (first, last)
    paths = ["--input", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    converted = ["--from", "megasparse", "--to", "huggingface", "--master-weights", *paths]
    for tool, arguments in ((export_sparse, paths), (convert_checkpoint, converted)):
        assert tool.main(arguments) == 64
        # Of the nearest family: one with squared ReLU, but with LayerNorm.
        setting = {"squared_relu": "normalization is 'RMSNorm'"}.get(name, f"{name} is True")
        assert f"architecture computes this model: {setting}" in capsys.readouterr().err
