"""FP8 scaling of GEMM operands, delayed and current; the door to Transformer Engine."""

from megasparse.fp8.current import CurrentScaling
from megasparse.fp8.delayed import DelayedScaling

Scaling = DelayedScaling | CurrentScaling
