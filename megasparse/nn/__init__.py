"""2:4 training of any PyTorch model: one call, no Megatron-core, no DeepSpeed."""

from megasparse.nn.handle import SparsityHandle as SparsityHandle
from megasparse.nn.handle import Verified as Verified
from megasparse.nn.linear import SparseLinear as SparseLinear
from megasparse.nn.pack import PackReport as PackReport
from megasparse.nn.pack import pack_ as pack_
from megasparse.nn.pack import unpack_ as unpack_
from megasparse.nn.sparsify import sparsify_ as sparsify_

__all__ = [
    "PackReport",
    "SparseLinear",
    "SparsityHandle",
    "Verified",
    "pack_",
    "sparsify_",
    "unpack_",
]
