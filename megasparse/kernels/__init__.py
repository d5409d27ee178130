"""The public functional API: pure functions on local tensors."""

from megasparse.kernels.gated_activation import geglu as geglu
from megasparse.kernels.gated_activation import swiglu as swiglu
from megasparse.kernels.masked_decay import count_flips as count_flips
from megasparse.kernels.masked_decay import masked_decay_ as masked_decay_
from megasparse.kernels.mvue24 import mvue24 as mvue24
from megasparse.kernels.pack24 import pack24 as pack24
from megasparse.kernels.pack24 import unpack24 as unpack24
from megasparse.kernels.packed24 import Packed24 as Packed24
from megasparse.kernels.patterns import decode_patterns as decode_patterns
from megasparse.kernels.patterns import encode_patterns as encode_patterns
from megasparse.kernels.patterns import transposable_patterns as transposable_patterns
from megasparse.kernels.prune24 import is_24 as is_24
from megasparse.kernels.prune24 import prune24_mask as prune24_mask
from megasparse.kernels.random import derive_seed as derive_seed
from megasparse.kernels.soft_threshold24 import s_ste_scale as s_ste_scale
from megasparse.kernels.soft_threshold24 import soft_threshold24 as soft_threshold24
from megasparse.kernels.spmm24 import spmm24 as spmm24
from megasparse.kernels.transposable24 import transposable24_mask as transposable24_mask
