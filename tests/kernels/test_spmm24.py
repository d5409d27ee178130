"""The sparse GEMM against float64."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import matmul24, pack24, spmm24
from megasparse.kernels.packed24 import packed_bytes
from megasparse.kernels.spmm24 import binding
from megasparse.kernels.spmm24.agreement import difference, packing_disagreement
from megasparse.kernels.spmm24.binding import library as cusparselt
from tests.kernels.test_pack24 import E4M3, sparse

# Relative error of the whole result: rounding of the output, and of the sums in fp8 hardware.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def relative_error(result, w, x):
    expected = x.double() @ w.double().t()
    return float((result.double() - expected).norm() / expected.norm())


def operands(tokens, shape, dtype, device):
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
    return sparse(shape, dtype, device), x.to(device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_16_bit(device, dtype, tokens):
    w, x = operands(tokens, (64, 192), dtype, device)
    packed = pack24(w)
    out = spmm24(packed, x)
    assert out.shape == (tokens, 64) and out.dtype == dtype and out.is_contiguous()
    assert relative_error(out, w, x) < TOLERANCE[dtype]
    assert relative_error(spmm24(packed, x.t().contiguous().t()), w, x) < TOLERANCE[dtype]
    assert relative_error(spmm24(packed, x.float(), backend="reference"), w, x) < 1e-6


@pytest.mark.parametrize("tokens", [1, 40])
def test_e4m3(device, tokens):
    w, x = operands(tokens, (128, 256), E4M3, device)
    w = (w.float() * 0.02).to(torch.bfloat16)
    packed = pack24(w, E4M3)
    quantized = packed.dense()
    for out_dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        out = spmm24(packed, x, out_dtype=out_dtype)
        assert out.dtype == (out_dtype or torch.bfloat16) and out.is_contiguous()
        tolerance = max(TOLERANCE[out.dtype], 3e-3 if out.is_cuda else 0)
        assert relative_error(out, quantized, x.float()) < tolerance


@pytest.mark.parametrize("columns", [1, 40, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul24(device, columns, transposed):
    w, x = operands(columns, (64, 192), torch.bfloat16, device)
    b = x if transposed else x.t().contiguous()
    out = matmul24(pack24(w), b, transposed=transposed)
    assert out.shape == (64, columns) and out.dtype == torch.bfloat16
    assert relative_error(out.t(), w, x) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matmul24_of_e4m3_takes_alpha_instead_of_the_scale(device, dtype):
    w, x = operands(48, (128, 256), E4M3, device)
    packed = pack24((w.float() * 0.02).to(torch.bfloat16), E4M3)
    plain = packed.dense() / packed.scale
    out = matmul24(packed, x, transposed=True, out_dtype=dtype, alpha=0.25)
    assert out.dtype == dtype
    assert relative_error(out.t(), plain * 0.25, x.float()) < 4e-3
    assert relative_error(spmm24(packed, x, alpha=0.25), plain * 0.25, x.float()) < 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
def test_a_bias_is_added_before_the_sum_is_rounded(device, dtype):
    w, x = operands(48, (128, 256), dtype, device)
    packed = pack24((w.float() * 0.02).to(torch.bfloat16), dtype)
    bias = torch.linspace(-5, 5, 128, device=device).bfloat16()
    exact = x.double() @ packed.dense().double().t()
    for alpha in (None, 0.5):
        factor = 1.0 if alpha is None else alpha / float(packed.scale)
        out = spmm24(packed, x, alpha=alpha, bias=bias).double()
        expected = exact * factor + bias.double()
        assert float((out - expected).norm() / expected.norm()) < 4e-3
        other = spmm24(packed, x, alpha=alpha, bias=-bias).double()  # not the one of before
        expected = exact * factor - bias.double()
        assert float((other - expected).norm() / expected.norm()) < 4e-3
    with pytest.raises(KernelError, match=r"bias of shape \(64,\).*expected \(128,\)"):
        spmm24(packed, x, bias=bias[:64])


def test_no_tokens(device):
    w, x = operands(3, (64, 64), torch.bfloat16, device)
    assert spmm24(pack24(w), x[:0]).shape == (0, 64)


def test_refusals(device):
    w, x = operands(3, (64, 64), torch.bfloat16, device)
    packed = pack24(w)
    with pytest.raises(KernelError, match="expected \\(tokens, 64\\)"):
        spmm24(packed, x[:, :32])
    with pytest.raises(KernelError, match="float64"):
        spmm24(packed, x.double())
    with pytest.raises(KernelError, match="expected one of reference, cusparselt"):
        spmm24(packed, x, backend="triton")
    if not x.is_cuda:
        with pytest.raises(KernelError, match="needs CUDA"):
            spmm24(packed, x, backend="cusparselt")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3])
def test_cusparselt_on_real_sizes(device, dtype):
    for tokens in (1, 130, 4096):
        w, x = operands(tokens, (1024, 2048), dtype, device)
        out = spmm24(pack24(w), x, backend="cusparselt")
        assert out.shape == (tokens, 1024) and out.is_contiguous()
        assert relative_error(out, w.float(), x.float()) < 5e-3


@pytest.mark.gpu
def test_cusparselt_refuses_mixed_formats(device):
    w, x = operands(16, (128, 128), torch.bfloat16, device)
    with pytest.raises(KernelError, match="expected the same"):
        spmm24(pack24(w, E4M3), x)
    with pytest.raises(KernelError, match="e5m2"):
        spmm24(pack24(w, E4M3), x.to(torch.float8_e5m2))
    with pytest.raises(KernelError, match="given transposed"):
        matmul24(pack24(w, E4M3), x.t().contiguous().to(E4M3))


def test_nothing_is_recorded_by_autograd(device):
    """These are building blocks of hand-written backward passes: the same on every backend."""
    w, x = operands(8, (64, 64), torch.bfloat16, device)
    packed = pack24(w.requires_grad_())
    assert not packed.buffer.requires_grad and not packed.values.requires_grad
    assert not spmm24(packed, x.requires_grad_()).requires_grad


def test_another_packed_layout_is_told(device):
    ours = torch.arange(64, dtype=torch.uint8, device=device)
    theirs = ours.clone()
    assert difference(ours, theirs, torch.bfloat16) is None
    theirs[[5, 9]] += 1
    assert "2 of 64 bytes differ, the first at 5" in difference(ours, theirs, torch.bfloat16)
    assert "into 32 bytes, expected 64" in difference(ours, theirs[:32], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3])
def test_the_library_packs_as_we_do(device, dtype):
    assert packing_disagreement(device, dtype) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (128, 128), (128, 384), (256, 128), (1024, 640)])
def test_the_library_reads_no_more_than_a_packed_matrix_has(device, dtype, n, k):
    device = torch.device("cuda", torch.cuda.current_device())
    problem = binding.Problem(n, k, 128, dtype, dtype, torch.bfloat16, False, True, 0)
    plan, packed, scratch = binding.plan(problem, device), ctypes.c_size_t(), ctypes.c_size_t()
    sizes = (ctypes.byref(packed), ctypes.byref(scratch))
    cusparselt().SpMMACompressedSize(plan._handle, plan._plan, *sizes)
    assert packed.value == packed_bytes((n, k), dtype)


def test_a_captured_product_keeps_its_workspace(monkeypatch):
    """It is a stream's own, lies outside of graphs' memory, and what it has outgrown stays."""
    monkeypatch.setattr(binding, "_workspaces", {})
    monkeypatch.setattr(binding, "_outgrown", [])
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    cpu = torch.device("cpu")
    assert binding._workspace(cpu, 1, 0) is None
    first = binding._workspace(cpu, 1, 1000)
    assert binding._workspace(cpu, 1, 400) == first
    assert binding._workspace(cpu, 2, 400) != first
    capturing = True
    assert binding._workspace(cpu, 1, 1000) == first
    for stream in (1, 3):
        with pytest.raises(KernelError, match="while a step is captured"):
            binding._workspace(cpu, stream, 1001)
    capturing = False
    binding.reserve_workspace(SimpleNamespace(device=cpu, cuda_stream=3))
    grown = binding._workspace(cpu, 1, 5000)
    # A graph still writes to the first: its memory is nobody else's.
    (kept,) = binding._outgrown
    assert kept.data_ptr() == first != grown
    capturing = True
    assert binding._workspace(cpu, 3, 1000) not in (None, first, grown)
    assert binding._workspace(cpu, 1, 5000) == grown
