"""The public functional API: pure functions on local tensors."""

from megasparse.kernels.gated_activation import geglu as geglu
from megasparse.kernels.gated_activation import swiglu as swiglu
from megasparse.kernels.mvue24 import mvue24 as mvue24
from megasparse.kernels.pack24 import pack24 as pack24
from megasparse.kernels.pack24 import unpack24 as unpack24
from megasparse.kernels.packed24 import Packed24 as Packed24
from megasparse.kernels.random import derive_seed as derive_seed
from megasparse.kernels.spmm24 import spmm24 as spmm24
