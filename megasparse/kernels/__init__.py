"""The public functional API: pure functions on local tensors, CPU and CUDA.

`backend=None | "reference" | "triton"` (`"cusparselt"` for spmm24) where an operation has more than
one implementation; asking for one that cannot run raises KernelError, saying why. N, K, T, R, C are
any sizes that the function's own docstring allows.

`scale` multiplies before a cast to 8 bits and `scale_inv` undoes it, as in Transformer Engine.
(`Packed24.scale` is what undoes it.) `seed` is an int, or an int64 tensor on the device, so that a
captured kernel draws other numbers at every replay.

Each operation is a folder: its door, here; `reference.py`, its definition in plain torch, which
returns values; and a fast version, `triton.py`, that agrees with it. `device/` holds what kernels
call, `checks.py` what doors ask, `dispatch.py` which of the two runs.

| function                                       | result                                       |
|------------------------------------------------|----------------------------------------------|
| prune24_mask(w (..., K))                       | bool (..., K): 2 largest of each 4 along K   |
| transposable24_mask(w (..., N, K))             | bool (..., N, K): best pattern per 4x4 block |
| is_24(w, dim=-1)                               | bool: at most 2 non-zeros in each 4          |
| soft_threshold24(w (..., K))                   | like w: S-STE's projection S before scaling  |
| soft_threshold24_with_sums(w (..., K))         | S, float64 (2,): <W, S>, <S, S>; one pass    |
| s_ste_scale(w (..., K), reduce=None)           | 0-d float32: <W, S> / <S, S>                 |
| scale_from_sums(sums (2,))                     | 0-d float32: that quotient, 1 for 0 / 0      |
| mvue24(g (R, C), seed, dim=-1, offsets, exact) | like g: unbiased, at most 2 of 4 along dim   |
| mvue24_variance(g (R, C), dim=-1, exact)       | 0-d float64: its variance, without a draw    |
| mvue24_squares(g (R, C), dim=-1, exact)        | float64 (2,): sum of g^2, and that variance  |
| masked_decay_(grad, w, mask, decay)            | grad, in place: += decay * (1 - mask) * w    |
| accumulate_(total, value)                      | total, in place: += value, of another dtype  |
| sum_parts(parts)                               | their sum, rounded once                      |
| copy_bytes_(out, source)                       | out, by multiprocessors                      |
| masked_adamw_(weight, grad, m, v, numbers)     | one AdamW step with masked decay, in place   |
| replace_mask_(mask, new, before)               | mask, in place: = new; 0-d int64: flips      |
| count_flips(mask_a, mask_b)                    | 0-d int64: entries that differ               |
| swiglu(x, gate), geglu(x, gate)                | like x: act(gate) * x, with autograd         |
| swiglu_fused(fused (..., 2 F))                 | (..., F): swiglu of [gate | x], autograd     |
| geglu_fused(fused (..., 2 F))                  | (..., F): geglu of [gate | x], autograd      |
| activated(projected, activation)               | swiglu, geglu or gelu by name, with autograd |
| activation_backward(dy, projected, activation) | like projected: its gradient                 |
| rotary_qkv(fused (S, B, width), angles, heads) | q, k, v of a projection, rotated; autograd    |
| split_qkv(fused, heads)                        | the same, not rotated: views; autograd       |
| scale_inv_of(w (N, K))                         | 0-d float32: amax / 448, undoes e4m3's scale |
| scales_of_amax(amax (1,), maximum=448)         | AmaxScales: current scaling's, of MVUE too   |
| rescale_(z, a, b)                              | z, in place: *= a * b, device scalars        |
| quantize_rows(x (T, K))                        | (T', K) e4m3 and (T,): a scale a row         |
| rescale_rows_(z (T, N), scale_inv (T,))        | z, in place: row by row; undoes that         |
| pack24(w (N, K), dtype=None, scale_inv=None)   | Packed24: the hardware's 2:4 layout          |
| unpack24(packed)                               | (N, K) dense                                 |
| mvue_pack24(dz (T, N), seed)                   | Packed24 (N, T): MVUE(dZ^T) in 16 bits       |
| mvue_pack24_experts(dz (T, N), counts, groups) | the same, packed for each expert; one launch |
| grad_pack24(dz (T, N), seed, scales)           | dz in 8 bits, MVUE(dZ^T) packed in e4m3      |
| grad_pack24_experts(dz (T, N), counts, groups) | the same, packed for each expert; one launch |
| activation_amax(fused (T, 2 F))                | float32 (1,): largest magnitude of activated |
| activation_grad_amax(dy (T, F), fused)         | the same of its gradient                     |
| expert_routes(routing_map (T, E), each)        | a router's choice as a list, by expert       |
| sum_rows(rows (T', H), spots, parts (T, k))    | (T, H): rows of a token's parts, added up    |
| expert_rows(counts, rooms, device, segments)   | which token each row of experts has, groups  |
| gather_rows(x (T, ...), sources (T',))         | (T', ...): x[sources], zeros for holes       |
| gather_float8(x (T, K), sources, counts)       | the same in e4m3: (T', K), (K, T_e) of each  |
| weighted_activation(fused (T, 2 F), weights)   | (T, F): activated times a weight a row       |
| weighted_activation_backward(dy, fused, ...)   | (T, 2 F), (T,): its gradients                |
| activation_float8(fused (T, 2 F), scale)       | activated in e4m3: (T', F), (F, T')          |
| activation_grad_pack24(dy (T, F), fused, seed) | grad_pack24 of activated's gradient          |
| norm_amax(x (T, H), weight, bias)              | float32 (1,): largest magnitude of a norm    |
| norm_float8(x (T, H), weight, bias, scale)     | a norm in e4m3: (T', H), (H, T'); statistics |
| tensor_figures(x)                              | non-zeros, sums of |x| and x^2, largest |x|  |
| add_square_(total, x, factor=1)                | total, in place: += sum of (factor x)^2      |
| add_rounding_figures_(sums, largest, x, x8)    | in place: what a rounding to 8 bits did      |
| transpose_float8(rows (T, K))                  | (K, T) e4m3, in the order of strided groups  |
| weight_pack24(w (N, K), mask, dtype, scale)    | W~ packed, W~^T or W~_d^T too; one pass      |
| weight_pack24_experts(w (E N, K), E, mask)     | the same of E stacked weights; one launch    |
| effective_weight(w (N, K), mask, beta)         | (N, K) float32: that W~ itself, unrounded    |
| spmm24(packed (N, K), x (T, K))                | (T, N): x @ W^T                              |
| spmm24_experts(packed, x (T, K), counts)       | (T, N): of each of some packed matrices      |
| matmul24_experts(packed, each)                 | (E, N, M): A_e @ b_e of each                 |
| encode_patterns(mask, transposable)            | uint8: the number of each pattern            |
| decode_patterns(indices, shape, transposable)  | bool mask: the inverse                       |
| transposable_patterns()                        | bool (90, 4, 4): the transposable patterns   |
| derive_seed(*words)                            | int: one seed from several integers          |
"""

from megasparse.kernels.accumulate import accumulate_ as accumulate_
from megasparse.kernels.activation import Activation as Activation
from megasparse.kernels.activation import activated as activated
from megasparse.kernels.activation import activation_backward as activation_backward
from megasparse.kernels.activation import geglu as geglu
from megasparse.kernels.activation import geglu_fused as geglu_fused
from megasparse.kernels.activation import swiglu as swiglu
from megasparse.kernels.activation import swiglu_fused as swiglu_fused
from megasparse.kernels.activation_amax import activation_amax as activation_amax
from megasparse.kernels.activation_amax import activation_grad_amax as activation_grad_amax
from megasparse.kernels.activation_float8 import activation_float8 as activation_float8
from megasparse.kernels.activation_grad_pack24 import (
    activation_grad_pack24 as activation_grad_pack24,
)
from megasparse.kernels.copy_bytes import copy_bytes_ as copy_bytes_
from megasparse.kernels.current_scaling import AmaxScales as AmaxScales
from megasparse.kernels.current_scaling import rescale_ as rescale_
from megasparse.kernels.current_scaling import scale_inv_of as scale_inv_of
from megasparse.kernels.current_scaling import scales_of_amax as scales_of_amax
from megasparse.kernels.expert_routes import Routes as Routes
from megasparse.kernels.expert_routes import expert_routes as expert_routes
from megasparse.kernels.expert_rows import Segments as Segments
from megasparse.kernels.expert_rows import expert_rows as expert_rows
from megasparse.kernels.expert_rows import room_for as room_for
from megasparse.kernels.gather_rows import gather_float8 as gather_float8
from megasparse.kernels.gather_rows import gather_rows as gather_rows
from megasparse.kernels.gather_rows import sum_rows as sum_rows
from megasparse.kernels.grad_pack24 import grad_pack24 as grad_pack24
from megasparse.kernels.grad_pack24.experts import grad_pack24_experts as grad_pack24_experts
from megasparse.kernels.mask_update import replace_mask_ as replace_mask_
from megasparse.kernels.masked_adamw import AdamW as AdamW
from megasparse.kernels.masked_adamw import masked_adamw_ as masked_adamw_
from megasparse.kernels.masked_decay import count_flips as count_flips
from megasparse.kernels.masked_decay import masked_decay_ as masked_decay_
from megasparse.kernels.mvue24 import mvue24 as mvue24
from megasparse.kernels.mvue24 import mvue24_squares as mvue24_squares
from megasparse.kernels.mvue24 import mvue24_variance as mvue24_variance
from megasparse.kernels.mvue_pack24 import mvue_pack24 as mvue_pack24
from megasparse.kernels.mvue_pack24.experts import mvue_pack24_experts as mvue_pack24_experts
from megasparse.kernels.norm_float8 import norm_amax as norm_amax
from megasparse.kernels.norm_float8 import norm_float8 as norm_float8
from megasparse.kernels.pack24 import pack24 as pack24
from megasparse.kernels.pack24 import unpack24 as unpack24
from megasparse.kernels.packed24 import Packed24 as Packed24
from megasparse.kernels.packed24 import PackedStack as PackedStack
from megasparse.kernels.patterns import decode_patterns as decode_patterns
from megasparse.kernels.patterns import encode_patterns as encode_patterns
from megasparse.kernels.patterns import transposable_patterns as transposable_patterns
from megasparse.kernels.prune24 import is_24 as is_24
from megasparse.kernels.prune24 import prune24_mask as prune24_mask
from megasparse.kernels.random import derive_seed as derive_seed
from megasparse.kernels.rotary_qkv import Heads as Heads
from megasparse.kernels.rotary_qkv import rotary_qkv as rotary_qkv
from megasparse.kernels.rotary_qkv import split_qkv as split_qkv
from megasparse.kernels.row_float8 import RowFloat8 as RowFloat8
from megasparse.kernels.row_float8 import quantize_rows as quantize_rows
from megasparse.kernels.row_float8 import rescale_rows_ as rescale_rows_
from megasparse.kernels.soft_threshold24 import s_ste_scale as s_ste_scale
from megasparse.kernels.soft_threshold24 import scale_from_sums as scale_from_sums
from megasparse.kernels.soft_threshold24 import soft_threshold24 as soft_threshold24
from megasparse.kernels.soft_threshold24 import (
    soft_threshold24_with_sums as soft_threshold24_with_sums,
)
from megasparse.kernels.spmm24 import matmul24 as matmul24
from megasparse.kernels.spmm24 import spmm24 as spmm24
from megasparse.kernels.spmm24.experts import matmul24_experts as matmul24_experts
from megasparse.kernels.spmm24.experts import spmm24_experts as spmm24_experts
from megasparse.kernels.sum_parts import sum_parts as sum_parts
from megasparse.kernels.tensor_figures import TensorFigures as TensorFigures
from megasparse.kernels.tensor_figures import add_rounding_figures_ as add_rounding_figures_
from megasparse.kernels.tensor_figures import add_square_ as add_square_
from megasparse.kernels.tensor_figures import tensor_figures as tensor_figures
from megasparse.kernels.transposable24 import transposable24_mask as transposable24_mask
from megasparse.kernels.transpose_float8 import transpose_float8 as transpose_float8
from megasparse.kernels.weight_pack24 import effective_weight as effective_weight
from megasparse.kernels.weight_pack24 import weight_pack24 as weight_pack24
from megasparse.kernels.weight_pack24.experts import weight_pack24_experts as weight_pack24_experts
from megasparse.kernels.weighted_activation import weighted_activation as weighted_activation
from megasparse.kernels.weighted_activation import (
    weighted_activation_backward as weighted_activation_backward,
)

__all__ = [
    "Activation",
    "AdamW",
    "AmaxScales",
    "Heads",
    "Packed24",
    "PackedStack",
    "RowFloat8",
    "Routes",
    "Segments",
    "TensorFigures",
    "accumulate_",
    "activated",
    "activation_amax",
    "activation_backward",
    "activation_float8",
    "activation_grad_amax",
    "activation_grad_pack24",
    "add_rounding_figures_",
    "add_square_",
    "copy_bytes_",
    "count_flips",
    "decode_patterns",
    "derive_seed",
    "effective_weight",
    "encode_patterns",
    "expert_routes",
    "expert_rows",
    "gather_float8",
    "gather_rows",
    "geglu",
    "geglu_fused",
    "grad_pack24",
    "grad_pack24_experts",
    "is_24",
    "masked_adamw_",
    "masked_decay_",
    "matmul24",
    "matmul24_experts",
    "mvue24",
    "mvue24_squares",
    "mvue_pack24",
    "mvue_pack24_experts",
    "norm_amax",
    "norm_float8",
    "pack24",
    "prune24_mask",
    "quantize_rows",
    "replace_mask_",
    "rescale_",
    "rescale_rows_",
    "room_for",
    "rotary_qkv",
    "s_ste_scale",
    "scale_from_sums",
    "scale_inv_of",
    "scales_of_amax",
    "soft_threshold24",
    "soft_threshold24_with_sums",
    "split_qkv",
    "spmm24",
    "spmm24_experts",
    "sum_parts",
    "sum_rows",
    "swiglu",
    "swiglu_fused",
    "tensor_figures",
    "transposable24_mask",
    "transposable_patterns",
    "unpack24",
    "weight_pack24",
    "weight_pack24_experts",
    "weighted_activation",
    "weighted_activation_backward",
]
