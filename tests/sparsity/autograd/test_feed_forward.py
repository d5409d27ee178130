"""The feed-forward function against two linears with an activation between: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megasparse.fp8.delayed import DelayedScaling
from megasparse.kernels import activated, prune24_mask, s_ste_scale, transposable24_mask
from megasparse.sparsity.autograd.feed_forward import feed_forward
from megasparse.sparsity.autograd.linear import NoComm, linear
from megasparse.sparsity.autograd.norm import norm_to_float8
from megasparse.sparsity.gemms import dense_fp8, fp8_products, packed_fp8
from megasparse.sparsity.gemms.choice import GemmChooser
from megasparse.sparsity.gemms.dense_fp8 import OperandQuantizers
from megasparse.sparsity.gemms.packed_fp8 import PackedFp8Gemms
from megasparse.sparsity.projection import Projected
from megasparse.sparsity.recipe import make_recipe
from megasparse.sparsity.shard import ShardSlice
from tests.sparsity.gemms import made
from tests.transformer_engine import needs_transformer_engine

K, F, N = 128, 128, 128
# Where the shard's halves lie in the whole layer: that of the second of two ranks.
PARTS = (ShardSlice(0, F, F), ShardSlice(F, 3 * F, F))


class Waiting:
    """Communication of a rank that holds half of the tokens; the other half is their negative.

    What travels is there after the wait, and not a number before it.
    """

    gathers = True

    def __init__(self, own_first=False):
        self.own_first = own_first

    def gather(self, x_local):
        return self._later(torch.cat([x_local, -x_local]))

    def own_part(self, tokens):
        return 0 if self.own_first else None

    def reduce(self, dx):
        return self._later(dx[: dx.shape[0] // 2] - dx[dx.shape[0] // 2 :])

    def _later(self, value):
        result = torch.full_like(value, float("nan"))
        return result, lambda: result.copy_(value)


class Block:
    """Weights, their scaling, and the block's output by either way."""

    def __init__(self, recipe, device, fused, comm=None, hybrid=False, activation="swiglu"):
        generator = torch.Generator().manual_seed(0)
        gated = activation != "gelu"
        self.activation = activation
        shapes = ((2 * F if gated else F, K), (N, F))
        self.sections = (PARTS if gated else PARTS[:1], (ShardSlice(0, 0, N),))
        self.weights = [
            (torch.randn(s, generator=generator) / 8).to(device).bfloat16().requires_grad_()
            for s in shapes
        ]
        self.biases = [None, None]
        if activation == "gelu":  # whose models have biases
            self.biases = [
                torch.randn(n, generator=generator).to(device).bfloat16().requires_grad_()
                for n, _ in shapes
            ]
        self.scales = DelayedScaling(device, history_length=2)
        self.slots = [OperandQuantizers.of(self.scales) for _ in shapes]
        self.scales.allocate()
        self.recipe, self.fused, self.comm = recipe, fused, comm or NoComm()
        self.hybrid, self.device = hybrid, device
        self.prepare()

    def prepare(self):
        self.gemms = [self._gemms(i) for i in range(2)]

    def _gemms(self, number):
        w, slots = self.weights[number].detach(), self.slots[number]
        if self.recipe is None:
            return made.dense_fp8(w, slots)
        recipe, mask, beta = make_recipe(self.recipe), None, None
        if recipe.projection == "soft_threshold":
            beta = s_ste_scale(w)
        else:
            mask = (transposable24_mask if recipe.transposable else prune24_mask)(w)
        chooser = GemmChooser(None) if w.is_cuda else None
        gemms = PackedFp8Gemms(recipe, self.sections[number], slots, self.hybrid, chooser=chooser)
        gemms.refill(w, Projected(mask, beta))
        return gemms

    def __call__(self, x, seeds=(5, 6)):
        if self.fused:
            return feed_forward(
                x, self.weights, self.gemms, self.comm, seeds, self.activation, self.biases
            )
        one, two = self.biases
        hidden = linear(x, self.weights[0], self.gemms[0], self.comm, seeds[0], bias=one)
        hidden = activated(hidden, self.activation)
        return linear(hidden, self.weights[1], self.gemms[1], seed=seeds[1], bias=two)

    def step(self, number, tokens=(50, 3)):
        """One step: its output, the three gradients, and the magnitudes that it has recorded."""
        generator = torch.Generator().manual_seed(number)
        whole = (tokens[0] * (2 if self.comm.gathers else 1), tokens[1])
        x = torch.randn(*tokens, K, generator=generator).to(self.device).bfloat16()
        dz = torch.randn(*whole, N, generator=generator).to(self.device).bfloat16() * 1e-3
        x.requires_grad_()
        z = self(x)
        z.backward(dz)
        trained = [p for p in (*self.weights, *self.biases) if p is not None]
        found = [z.detach(), x.grad, *(p.grad for p in trained), self.scales.history.clone()]
        for p in trained:
            p.grad = None
        self.scales.finish_step()
        self.prepare()
        return found


class Checkpointed(Block):
    """Its forward pass runs again in the backward pass."""

    def __call__(self, x, seeds=(5, 6)):
        return checkpoint(super().__call__, x, seeds, use_reentrant=True)


@pytest.mark.parametrize(
    ("recipe", "hybrid", "gathers", "activation"),
    [
        ("fst", False, False, "swiglu"),
        ("s_ste", True, True, "swiglu"),
        ("ste", False, True, "geglu"),
        (None, False, False, "swiglu"),
        ("fst", False, True, "geglu"),
        ("fst", False, False, "gelu"),
        ("s_ste", True, True, "gelu"),
        (None, False, False, "gelu"),
    ],
)
def test_the_same_bits_in_every_step(device, monkeypatch, recipe, hybrid, gathers, activation):
    needs_transformer_engine(device)
    comm = Waiting(own_first=True) if gathers else NoComm()
    ours, theirs = (
        Block(recipe, device, fused, comm, hybrid, activation) for fused in (True, False)
    )
    calls = []
    for module, name in ((dense_fp8, "activation_float8"), (packed_fp8, "activation_grad_pack24")):
        kernel = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, n=name, k=kernel, **o: (calls.append(n), k(*a, **o))[1]
        )
    for number in range(3):
        results = [block.step(number) for block in (ours, theirs)]
        for found, expected in zip(*results, strict=True):
            assert expected.isfinite().all() and expected.any()
            assert torch.equal(found, expected)
    packs = recipe is not None and make_recipe(recipe).mvue != "off"
    assert calls == 3 * (
        ["activation_float8", "activation_grad_pack24"] if packs else ["activation_float8"]
    )


@pytest.mark.parametrize("recipe", ["fst", "ste", "dense"])
def test_kernels_undo_what_is_left_of_the_scaling(device, monkeypatch, recipe):
    """Products whose factors the host no longer knows, as in a captured step, give the same bits;
    what an activation's kernels read is not corrected before."""
    needs_transformer_engine(device)
    ours, theirs = (Block(None if recipe == "dense" else recipe, device, True) for _ in range(2))
    rescale, shapes = fp8_products.rescale_, []
    monkeypatch.setattr(
        fp8_products,
        "rescale_",
        lambda z, *a, **o: (shapes.append(z.shape[1]), rescale(z, *a, **o))[1],
    )
    for number in range(2):
        for found, expected in zip(ours.step(number), theirs.step(number), strict=True):
            assert torch.equal(found, expected)
        assert shapes == [] or number
        ours.scales.host_follows = False
        ours.scales.assumed = [
            assumed * 2.0 ** (i % 5 - 2) for i, assumed in enumerate(ours.scales.assumed)
        ]
    # fc2's output, and of fst fc1's gradient of the input and the weights'; but not fc1's output.
    assert 2 * F not in shapes and (shapes != []) == (recipe != "dense")


def test_what_is_not_trained_is_not_computed_and_leaves_no_trace(device):
    needs_transformer_engine(device)
    block = Block("fst", device, True)
    block.step(0)
    before = block.scales.history.clone()
    x = torch.randn(150, K, device=device).bfloat16()
    with torch.no_grad():
        z = block(x)
    assert not z.requires_grad and torch.equal(block.scales.history, before)
    for frozen in ((0,), (1,), (0, 1)):
        for number, w in enumerate(block.weights):
            w.requires_grad_(number not in frozen)
            w.grad = None
        for wanted in (False, True):
            x = x.detach().requires_grad_(wanted)
            z = block(x)
            if frozen == (0, 1) and not wanted:
                assert not z.requires_grad
                continue
            z.sum().backward()
            assert (x.grad is not None) == wanted
            assert [w.grad is None for w in block.weights] == [n in frozen for n in range(2)]


@pytest.mark.parametrize("gathers", [False, True])
def test_each_gradient_alone_is_that_of_all(device, gathers):
    """Of the input, the weights and the biases: what one needs does not hang on another."""
    needs_transformer_engine(device)
    block = Block("fst", device, True, Waiting() if gathers else NoComm(), activation="gelu")
    expected = block.step(0)[1:-1]
    leaves = [*block.weights, *block.biases]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, K, generator=generator).to(device).bfloat16()
    dz = torch.randn(100 if gathers else 50, 3, N, generator=generator).to(device).bfloat16() * 1e-3
    for number, gradient in enumerate(expected):
        block = Block("fst", device, True, block.comm, activation="gelu")  # scales of the start
        leaves = [x.detach(), *block.weights, *block.biases]
        for one, leaf in enumerate(leaves):
            leaf.requires_grad_(one == number)
        block(leaves[0]).backward(dz)
        assert torch.equal(leaves[number].grad, gradient)
        assert all(leaf.grad is None for one, leaf in enumerate(leaves) if one != number)


class Twice(NoComm):
    """The other of two ranks has the same tokens."""

    gathers = True

    def gather(self, x_local):
        return torch.cat([x_local, x_local]), lambda: None

    def own_part(self, tokens):
        return tokens


def test_an_input_in_8_bits_is_gathered_as_it_is(device):
    needs_transformer_engine(device)
    block, gain = Block("fst", device, True, Twice()), torch.ones(K, device=device).bfloat16()
    block.fused = True
    block(torch.randn(128, K, device=device).bfloat16())  # gives the scales
    x = torch.randn(128, K, device=device).bfloat16()
    scale = block.slots[0].x.known_scale()
    how = {"centred": False, "eps": 1e-5, "scale": scale, "trained": True, "gathered": True}
    z = block(norm_to_float8(x, gain, None, **how))
    assert torch.equal(z, block(torch.nn.functional.rms_norm(x, (K,), gain, 1e-5)))
    assert z.shape == (256, N)


def test_a_recomputation_repeats_the_draws(device):
    """Under activation checkpointing gradients and recorded magnitudes are what they were."""
    needs_transformer_engine(device)
    plain, again = Block("fst", device, True), Checkpointed("fst", device, True)
    for number in range(2):
        for found, expected in zip(again.step(number), plain.step(number), strict=True):
            assert torch.equal(found, expected)
