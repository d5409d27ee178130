"""`sparsify_` with the optimizers, wrappers and habits of plain PyTorch."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megasparse.errors import CheckpointError, ConfigError, NumericsError
from megasparse.kernels import is_24
from megasparse.nn import SparseLinear, sparsify_
from tests.nn.models import WIDTH, Model, loss_of, micro_batch, stepper, train

FFN = ["*.mlp.*"]
DECAYED = {"masked_decay": 1e-2, "mask_update_interval": 2}


def _trained(recipe="fst", steps=5, optimizer=torch.optim.AdamW, wrap=None, **settings):
    model = Model(wrap=wrap)
    handle = sparsify_(model, recipe, FFN, **settings)
    losses = train(model, stepper(model, optimizer(model.parameters(), lr=3e-3)), range(steps))
    return model, handle, losses


def _same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class ByHand:
    """An optimizer that torch knows nothing of: plain gradient descent."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            parameter.add_(parameter.grad, alpha=-self.lr)

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None


@pytest.mark.parametrize("recipe", ["fst", "s_ste", "sr_ste", "ste", "ast"])
def test_training_ends_in_plain_linears_with_zeros(recipe):
    model, handle, losses = _trained(recipe, 8, **({} if recipe in ("s_ste", "ste") else DECAYED))
    assert losses[-1] < losses[0]
    verified = handle.verify()
    assert len(verified) == 4 and all(0.25 < one.density <= 0.5 for one in verified)
    before = model(micro_batch(0, 0))
    assert handle.finalize() == 4
    assert torch.equal(model(micro_batch(0, 0)), before)
    for name, module in model.named_modules():
        assert not isinstance(module, SparseLinear)
        if "mlp.linear" in name:
            assert type(module) is torch.nn.Linear and is_24(module.weight)
            assert recipe != "fst" or is_24(module.weight, dim=0)
    assert not is_24(model.head.weight)
    assert "_handle" not in model.layers[0].mlp.linear_fc1.__dict__


def test_the_decay_joins_the_gradient_of_any_optimizer():
    """Three ways to step by the same rule, of which one is not torch's: the same weights."""
    ways = [
        lambda model, handle: torch.optim.SGD(model.parameters(), lr=0.05, foreach=False),
        lambda model, handle: ByHand(model.parameters(), 0.05),
        lambda model, handle: torch.optim.SGD(model.parameters(), lr=0.05, foreach=False),
    ]
    models = []
    for number, way in enumerate(ways):
        model = Model()
        handle = sparsify_(model, "sr_ste", FFN, **DECAYED)
        optimizer = way(model, handle)

        def step(model=model, handle=handle, optimizer=optimizer, number=number):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if number > 0:  # beside a torch optimizer the call changes nothing
                handle.step()
            optimizer.step()
            optimizer.zero_grad()

        train(model, step, range(5))
        assert handle.step_number == 5
        models.append(model)
    assert _same_weights(models[0], models[1]) and _same_weights(models[0], models[2])
    without = Model()
    sparsify_(without, "sr_ste", FFN, masked_decay=0.0, mask_update_interval=2)
    optimizer = torch.optim.SGD(without.parameters(), lr=0.05, foreach=False)
    train(without, stepper(without, optimizer), range(5))
    assert not _same_weights(models[0], without)


def test_several_optimizers_make_one_step_and_closures_are_decayed_inside():
    expected, handle, losses = _trained(
        optimizer=partial(torch.optim.SGD, foreach=False), **DECAYED
    )
    two = Model()
    of_two = sparsify_(two, "fst", FFN, **DECAYED)
    parts = [two.layers[0], two.layers[1], two.head]
    parts = [torch.optim.SGD(part.parameters(), lr=3e-3, foreach=False) for part in parts]

    def step():
        torch.nn.utils.clip_grad_norm_(two.parameters(), 1.0)
        for optimizer in parts:
            optimizer.step()
            optimizer.zero_grad()

    assert train(two, step, range(5)) == losses
    assert of_two.step_number == handle.step_number == 5
    closed = Model()
    sparsify_(closed, "fst", FFN, **DECAYED)
    optimizer = torch.optim.SGD(closed.parameters(), lr=3e-3, foreach=False)
    for number in range(5):

        def closure(number=number):
            optimizer.zero_grad()
            train(closed, lambda: None, range(number, number + 1))
            torch.nn.utils.clip_grad_norm_(closed.parameters(), 1.0)

        if number % 2:
            optimizer.step(closure=closure)
        else:
            optimizer.step(closure)
    assert _same_weights(expected, two) and _same_weights(expected, closed)


def test_an_optimizer_in_the_backward_pass_is_one_step():
    """One a parameter, each stepping as soon as its gradient is there, with recomputed layers."""
    model = Model(wrap=lambda block, x: checkpoint(block, x, use_reentrant=False))
    handle = sparsify_(model, "fst", FFN, **DECAYED)
    optimizers = {p: torch.optim.SGD([p], lr=3e-3) for p in model.parameters()}

    def step_one(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_one)
    for number in range(4):
        loss_of(model, micro_batch(number, 0)).backward()
        assert handle._run.clock.step == number
    assert handle.step_number == 4
    assert [layer.state.preparations for layer in handle.layers.values()] == [4] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_draw_what_they_would_have_drawn(reentrant):
    expected, _, losses = _trained(**DECAYED)

    def recompute(block, x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        return checkpoint(block, x, use_reentrant=reentrant)

    model, _, again = _trained(wrap=recompute, **DECAYED)
    assert again == losses and _same_weights(model, expected)


def test_draws_differ_between_micro_batches_layers_and_steps():
    model = Model()
    handle = sparsify_(model, "fst", FFN)
    seen = []
    for layer in handle.layers.values():
        inner = layer._seed
        layer.__dict__["_seed"] = lambda inner=inner: seen.append(inner()) or seen[-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, stepper(model, optimizer), range(3), micro_batches=3)
    assert len(seen) == len(set(seen)) == 3 * 3 * 4


def test_one_linear_used_twice_in_a_pass_draws_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.mlp(self.mlp(x))

    model = Twice()
    handle = sparsify_(model, "fst", ["mlp"])
    loss_of(model, micro_batch(0, 0)).backward()
    assert handle.layers["mlp"]._draws[:2] == (0, 2)


def test_autocast_computes_in_its_precision_and_keeps_float32_masters():
    model = Model()
    handle = sparsify_(model, "fst", FFN, **DECAYED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for number in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.layers[0].mlp.linear_fc1(micro_batch(number, 0))
            assert hidden.dtype == torch.bfloat16
            loss = loss_of(model, micro_batch(number, 0))
        loss.backward()
        layer = model.layers[0].mlp.linear_fc1
        assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32
        assert layer.bias.grad.dtype == torch.float32
        stepper(model, optimizer)()
        model(micro_batch(0, 0))  # an evaluation in float32 between
        losses.append(loss.item())
    assert losses[-1] < losses[0] and len(handle.verify()) == 4


def test_fp8_on_a_cpu_by_definition_and_dense_layers_beside():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(128, 256), "out": torch.nn.Linear(256, 128)})

    def run(x):
        return model["out"](torch.nn.functional.gelu(model["up"](x)))

    for fp8 in ("delayed", "tensorwise"):
        handle = sparsify_(model, "fst", ["up"], fp8, fp8_layers=["out"], **DECAYED)
        assert handle.layers["out"].state is None and handle.layers["out"].dense is not None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x, losses = torch.randn(130, 128), []
        with pytest.raises(ConfigError, match=r"fp8 with torch.float32, expected bfloat16"):
            run(x)
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = run(x)
                loss = (z.float() - x).square().mean()
            loss.backward()
            stepper(model, optimizer)()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        state = handle.state_dict()["layers"]["up"]
        assert ("fp8_scale" in state) == (fp8 == "delayed")
        assert handle.finalize() == 1 and is_24(model["up"].weight)


def test_a_resumed_run_repeats_the_undisturbed_one():
    whole, _, losses = _trained(steps=6, train_iters=12, dense_warmup_fraction=0.2, **DECAYED)
    first = Model()
    handle = sparsify_(first, "fst", FFN, train_iters=12, dense_warmup_fraction=0.2, **DECAYED)
    optimizer = torch.optim.AdamW(first.parameters(), lr=3e-3)
    begun = train(first, stepper(first, optimizer), range(3))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), handle.state_dict()))
    assert not any("mask" in key for key in saved[0])

    second = Model(seed=9)
    resumed = sparsify_(
        second, "fst", FFN, train_iters=12, dense_warmup_fraction=0.2, seed=77, **DECAYED
    )
    optimizer = torch.optim.AdamW(second.parameters(), lr=3e-3)
    second(micro_batch(0, 0))  # its own operands are forgotten
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    assert begun + train(second, stepper(second, optimizer), range(3, 6)) == losses
    assert _same_weights(second, whole)


def test_states_of_other_models_and_recipes_are_refused_and_change_nothing():
    model, handle, _ = _trained(**DECAYED)
    state = handle.state_dict()
    cases = [
        ({**state, "format": 7}, "format 7, expected 1"),
        ({**state, "recipe": "ste"}, "of the recipe ste, expected fst"),
        ({**state, "layers": {}}, "layers differ: missing layers.0.mlp.linear_fc1"),
    ]
    name = "layers.0.mlp.linear_fc1"
    short = {**state["layers"], name: {**state["layers"][name], "mask": torch.zeros(3)}}
    cases.append(({**state, "layers": short}, "a mask of 48 entries, expected 512"))
    for bad, message in cases:
        with pytest.raises(CheckpointError, match=message):
            handle.load_state_dict(bad)
    after = handle.state_dict()
    assert all(
        torch.equal(after["layers"][n]["mask"], state["layers"][n]["mask"]) for n in state["layers"]
    )


def test_phases_follow_the_length_of_the_run():
    model = Model()
    handle = sparsify_(
        model, "fst", FFN, train_iters=8, dense_warmup_fraction=0.25, dense_tail_fraction=0.25
    )
    optimizer, phases = torch.optim.SGD(model.parameters(), lr=0.01), []
    for number in range(8):
        phases.append(handle.sparse_now)
        train(model, stepper(model, optimizer), range(number, number + 1))
    assert phases == [False] * 2 + [True] * 4 + [False] * 2
    before = [p.clone() for p in model.parameters()]
    assert handle.finalize() == 0  # a dense tail ends dense
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_compiled_models_break_their_graph_at_each_layer_and_say_why_where_they_may_not():
    expected, _, losses = _trained(steps=2, **DECAYED)
    model = Model()
    sparsify_(model, "fst", FFN, **DECAYED)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    assert train(compiled, stepper(model, optimizer), range(2)) == losses
    assert _same_weights(model, expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="choose their operands on the host"):
        torch.compile(model, backend="eager", fullgraph=True)(micro_batch(0, 0))
    torch._dynamo.reset()


def test_an_average_of_weights_prunes_its_own():
    model, _, _ = _trained(**DECAYED)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for number in range(3):
        train(model, stepper(model, optimizer), range(number, number + 1))
        average.update_parameters(model)
        with torch.no_grad():
            z = average(micro_batch(0, 0))
        plain = copy.deepcopy(average.module)
        layer = plain.layers[0].mlp.linear_fc1
        used = layer.state.effective_at(layer.weight.detach(), layer._run.clock.step)
        assert is_24(used) and torch.isfinite(z).all()


def test_weights_that_change_otherwise_are_noticed():
    model = Model()
    handle = sparsify_(model, "ste", FFN)
    x = micro_batch(0, 0)
    model(x)
    with torch.no_grad():
        for layer in handle.layers.values():
            layer.weight.mul_(-2.0)
    changed = model(x)
    handle.invalidate()
    assert torch.equal(model(x), changed)
    with torch.no_grad():
        model.layers[0].mlp.linear_fc1.weight[3, 5] = float("nan")
    with pytest.raises((NumericsError, ValueError), match="NaN"):
        handle.verify()


def test_the_handle_lives_as_long_as_the_model_and_no_longer():
    from torch.optim import optimizer as hooks

    gc.collect()  # models of other tests
    model = Model()
    before = len(hooks._global_optimizer_pre_hooks)
    handle = weakref.ref(sparsify_(model, "fst", FFN))
    gc.collect()
    assert handle() is not None and len(hooks._global_optimizer_pre_hooks) == before + 1
    del model
    gc.collect()
    assert handle() is None and len(hooks._global_optimizer_pre_hooks) == before


def test_subclasses_that_compute_the_same_are_taken_and_given_back():
    class Configured(torch.nn.Linear):
        kind = "configured"

    layer = torch.nn.ModuleDict({"mlp": Configured(WIDTH, WIDTH)})
    handle = sparsify_(layer, "ste", ["mlp"])
    assert isinstance(layer["mlp"], SparseLinear) and layer["mlp"].kind == "configured"
    expected = layer["mlp"](micro_batch(0, 0))
    assert handle.finalize() == 1 and type(layer["mlp"]) is Configured
    assert torch.equal(layer["mlp"](micro_batch(0, 0)), expected)


def test_odd_inputs():
    model = Model()
    sparsify_(model, "fst", FFN)
    layer = model.layers[0].mlp.linear_fc1
    whole = torch.randn(3, 5, WIDTH)
    z = layer(whole)
    assert z.shape == (3, 5, 32)
    torch.testing.assert_close(layer(whole[1, 2]), z[1, 2])
    assert layer(whole[:0]).shape == (0, 5, 32) and layer(whole[:, :0]).shape == (3, 0, 32)
    layer(whole[:1, :3]).sum().backward()  # 3 tokens, no multiple of 4
    assert torch.isfinite(layer.weight.grad).all()
    with pytest.raises(RuntimeError, match=r"the input is torch.float16, expected torch.float32"):
        layer(whole.half())


BAD = [
    ({"recipe": "fts"}, "sparsity_recipe 'fts', expected one of"),
    (
        {"layers": ["*.mlp.*", "*.mpl.*"]},
        r"no torch.nn.Linear is named like '\*.mpl.\*'; there are",
    ),
    ({"masked_dekay": 1.0}, "unknown setting 'masked_dekay'"),
    ({"dense_tail_fraction": 0.1}, "dense_tail_fraction 0.1: expected train_iters"),
    ({"train_iters": 0}, "train_iters 0, expected at least 1"),
    ({"mask_metric": "wanda", "recipe": "ste"}, "only a run of megasparse calibrates"),
    ({"fp8": "delayed"}, "layers.0.mlp.linear_fc1: FP8 of a 2:4 linear"),
    ({"fp8_layers": ["head"]}, "fp8_layers is given without fp8"),
    ({"layers": ["odd"]}, "odd: a weight of 6 x 16 cuts a 4x4 block"),
    ({"layers": ["tied"]}, "tied: its weight is shared with table"),
    ({"layers": ["special"]}, "special: is a Special with a forward pass of its own"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[m[:30] for _, m in BAD])
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(arguments, message):
    class Special(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Model()
    model.odd = torch.nn.Linear(WIDTH, 6)
    model.table, model.tied = torch.nn.Embedding(32, WIDTH), torch.nn.Linear(WIDTH, 32)
    model.tied.weight = model.table.weight
    model.special = Special(WIDTH, WIDTH)
    with pytest.raises(ConfigError, match=message):
        sparsify_(model, **{"layers": FFN, **arguments})
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


def test_twice_is_refused_and_ast_wants_adamw():
    model = Model()
    handle = sparsify_(model, "ast", FFN, masked_decay_ramp_iters=0)
    with pytest.raises(ConfigError, match="sparse already"):
        sparsify_(model, "fst", FFN)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="the optimizer is SGD; expected torch.optim.AdamW"):
        train(model, stepper(model, sgd), range(1))
    handle.finalize()
    sparsify_(model, "fst", FFN)


FORBIDDEN = """
import importlib.machinery, sys
class Others(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.split(".")[0] in {%s}
        return None if missing else super().find_spec(name, path, target)
sys.meta_path = [Others if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
import torch
from megasparse.nn import sparsify_
model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(16, 16)})
handle = sparsify_(model, "fst", ["mlp"])
optimizer = torch.optim.AdamW(model.parameters())
model["mlp"](torch.randn(8, 16)).square().mean().backward()
optimizer.step()
handle.verify()
assert handle.finalize() == 1
import megasparse.convert, megasparse.estimate
for module, line in (
    ("megatron.spec", "megasparse.megatron needs megatron-core, which is not installed: "
     "pip install 'megasparse[train]'"),
    ("train.loop", "megasparse.train needs deepspeed"),
    ("data.tokenizer", "pip install 'megasparse[train]' or pip install 'megasparse[convert]'"),
    ("tensor_files", "megasparse.tensor_files needs safetensors"),
    ("metrics.trackers", "needs tensorboard"),
):
    try:
        __import__("megasparse." + module)
    except ImportError as error:
        assert line in str(error), error
    else:
        raise AssertionError(module)
from megasparse.metrics import plots
from megasparse.config import load_config
assert not plots.available() and "megasparse[plot]" in plots.MISSING
try:
    load_config(["--config", "quickstart"])
except Exception as error:
    assert "a YAML file needs pyyaml" in str(error)
else:
    raise AssertionError("yaml")
"""


def test_it_needs_torch_alone():
    others = ["megatron", "deepspeed", "transformer_engine", "yaml", "tqdm", "safetensors"]
    others += ["sentencepiece", "tokenizers", "tensorboard", "matplotlib", "transformers"]
    code = FORBIDDEN % ", ".join(map(repr, others))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
