"""megatron-core is imported without torch's compiler where a run starts, and nothing misses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys, torch
from megasparse.megatron.import_without_compile import import_megatron
before = torch.compile
import_megatron()
import megasparse.train.main
assert torch.compile is before
loaded = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
assert not loaded, loaded
from megatron.core.fusions.fused_bias_swiglu import swiglu
x = torch.randn(3, 8)
gate, up = x.chunk(2, -1)
torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(gate) * up)
"""
# What would have been compiled fails when it is called; none of it may be.
UNUSED = """
import sys, torch
compile_, decorated = torch.compile, []
def unused(function):
    decorated.append(function.__qualname__)
    def call(*_, **__):
        raise AssertionError(f"{function.__qualname__} is called")
    return call
torch.compile = unused
import megatron.core
torch.compile = compile_
assert len(decorated) > 10
from megasparse.config import load_config, resolve
from pathlib import Path
from megasparse.megatron.inference import CachedDecoder
from megasparse.distributed.control_plane import make_control_plane
from megasparse.inference.loading import load_model
from megasparse.train.main import pretrain
from megasparse.checkpoint.model import StoredModel, open_checkpoint
tiny = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 64 "
    "--micro-batch-size 2 --global-batch-size 2 --lr 1e-3 --train-iters 2 --eval-iters 1 --bf16 "
    "--mock-data --save-interval none"
)
llama = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--recompute-granularity full --sparsity-recipe s_ste"
)
gpt = "--hidden-dropout 0.1 --attention-dropout 0.1 --sparsity-recipe fst"
for number, flags in enumerate((gpt, llama)):
    folder = f"{sys.argv[1]}/{number}"
    arguments = [*tiny.split(), *flags.split(), "--run-dir", folder]
    assert pretrain(resolve(load_config(arguments), 1)) == 0
    # What launch/generate.py and launch/evaluate.py do with it.
    source = StoredModel(open_checkpoint(Path(folder), make_control_plane()))
    model, _ = load_model(source, torch.device("cpu"), 1, False)
    decoder = CachedDecoder(model, 8)
    for tokens in ([[1, 2, 3]], [[4]]):
        assert torch.isfinite(decoder.feed(torch.tensor(tokens))).all()
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict[str, subprocess.Popen[str]]:
    """Both programs, each of which imports everything, side by side."""
    folder = str(tmp_path_factory.mktemp("runs"))
    return {
        script: subprocess.Popen(
            [sys.executable, "-c", script, folder], cwd=ROOT, text=True, stderr=subprocess.PIPE
        )
        for script in (WITHOUT, UNUSED)
    }


def _end_well(program: subprocess.Popen[str]) -> None:
    _, told = program.communicate(timeout=300)
    assert program.returncode == 0, told[-2000:]


def test_a_run_starts_without_the_compiler(started):
    _end_well(started[WITHOUT])


def test_no_run_calls_what_would_have_been_compiled(started):
    _end_well(started[UNUSED])
