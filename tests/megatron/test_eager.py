"""megatron-core is imported without torch's compiler where a run starts, and works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, torch
from megasparse.megatron.eager import import_megatron
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


def test_a_run_starts_without_the_compiler():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
