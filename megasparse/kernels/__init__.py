"""The public functional API: pure functions on local tensors."""

from megasparse.kernels.masked_decay import count_flips, masked_decay_
from megasparse.kernels.patterns import decode_patterns, encode_patterns, transposable_patterns
from megasparse.kernels.prune24 import is_24, prune24_mask
from megasparse.kernels.soft_threshold24 import s_ste_scale, soft_threshold24
from megasparse.kernels.transposable24 import transposable24_mask

__all__ = [
    "count_flips",
    "decode_patterns",
    "encode_patterns",
    "is_24",
    "masked_decay_",
    "prune24_mask",
    "s_ste_scale",
    "soft_threshold24",
    "transposable24_mask",
    "transposable_patterns",
]
