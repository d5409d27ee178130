"""The public functional API: pure functions on local tensors."""

from megasparse.kernels.gated_activation import geglu as geglu
from megasparse.kernels.gated_activation import swiglu as swiglu
from megasparse.kernels.mvue24 import mvue24 as mvue24
from megasparse.kernels.random import derive_seed as derive_seed
