"""Packing: byte for byte the hardware layout, and back."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from megasparse.errors import KernelError
from megasparse.kernels import Packed24, pack24, unpack24
from tests.kernels.poison import poison_new_tensors

# The name `megasparse.kernels.pack24` is the function.
pack24_module = sys.modules["megasparse.kernels.pack24"]

BACKENDS = ["reference", "triton"]
E4M3 = torch.float8_e4m3fn
FORMATS = [torch.bfloat16, torch.float16, E4M3]
SHAPES = [(64, 128), (128, 384), (192, 640)]


def sparse(shape, dtype, device, fewest=0, seed=0):
    """A 2:4 matrix with `fewest` to 2 non-zeros in each group, some dropped ones -0.0."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    w = torch.randn(rows, columns // 4, 4, generator=generator)
    w = torch.where(w.abs() < 0.05, 0.05, w)
    rank = torch.rand(w.shape, generator=generator).argsort(-1)
    count = torch.randint(fewest, 3, (rows, columns // 4, 1), generator=generator)
    return (w * (rank < count)).view(shape).to(dtype).to(device)


def literal_layout(w):
    """Values and metadata by the published formulas, one group at a time."""
    rows, columns = w.shape
    eight_bit = w.dtype == E4M3
    numbers = w.float().tolist()
    values = torch.zeros(rows, columns // 2)
    metadata = [0] * (rows * columns // 8)
    for r, g in itertools.product(range(rows), range(columns // 4)):
        group = numbers[r][4 * g : 4 * g + 4]
        kept = [i for i in range(4) if group[i] != 0]
        spare = [i for i in (3, 2, 1, 0) if i not in kept]
        i0, i1 = sorted(kept + spare[: 2 - len(kept)])
        values[r, 2 * g], values[r, 2 * g + 1] = group[i0], group[i1]
        if eight_bit:
            byte = (r // 64) * 8 * columns + (g // 16) * 512 + ((r // 16) % 4) * 128
            byte += (r % 8) * 16 + ((g // 2) % 4) * 4 + ((g // 8) % 2) * 2 + (r // 8) % 2
            nibble = g % 2
        else:
            byte = (r // 64) * 8 * columns + (g // 8) * 256 + ((r // 16) % 4) * 64
            byte += (r % 8) * 8 + (g % 4) * 2 + (g // 4) % 2
            nibble = (r // 8) % 2
        metadata[byte] |= (i0 | i1 << 2) << 4 * nibble
    return values, torch.tensor(metadata, dtype=torch.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_layout_is_the_published_one(device, monkeypatch, dtype, backend):
    for shape in SHAPES:
        w = sparse(shape, dtype, device)
        values, metadata = literal_layout(w.cpu())
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            packed = pack24(w, backend=backend)
        assert packed.shape == shape and packed.dtype == dtype and packed.scale == 1
        assert torch.equal(packed.values.cpu().float(), values)
        assert torch.equal(packed.metadata.cpu(), metadata)
        size = w.numel() * w.element_size() * (10 if dtype == E4M3 else 9) // 16
        assert packed.buffer.shape == (size,) and packed.buffer.dtype == torch.uint8
        assert packed.buffer.data_ptr() == packed.values.data_ptr()
        joined = torch.cat([packed.values.view(torch.uint8).view(-1), packed.metadata])
        assert torch.equal(packed.buffer, joined)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_round_trip(device, monkeypatch, dtype, backend):
    for shape in SHAPES:
        w = sparse(shape, dtype, device)
        packed = pack24(w, backend=backend)
        with monkeypatch.context() as patch:
            poison_new_tensors(patch)
            dense = unpack24(packed, backend=backend)
        assert dense.dtype == (torch.float32 if dtype == E4M3 else dtype)
        assert torch.equal(dense.float(), w.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pattern(device, backend):
    """All groups of special values with at most two non-zeros, NaN and infinity among them."""
    inf, nan = float("inf"), float("nan")
    values = [0.0, -0.0, 1.0, -2.0, 2.0**-133, inf, nan]
    groups = torch.tensor(
        [g for g in itertools.product(values, repeat=4) if sum(v != 0 for v in g) <= 2]
    )
    w = torch.zeros(64 * 64, 4)
    w[: len(groups)] = groups
    w = w.view(64, 256).to(device, torch.bfloat16)
    packed = pack24(w, backend=backend)
    assert torch.equal(packed.buffer, pack24(w, backend="reference").buffer)
    dense = unpack24(packed, backend=backend)
    assert torch.equal(dense.isnan(), w.isnan())
    assert torch.equal(dense.nan_to_num(), w.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantization(device, dtype, backend):
    w = sparse((64, 256), dtype, device) * 0.01
    w[3, :4] = torch.tensor([0.0, 1e-6, 0.0, -1e-7])  # rounds to zero in e4m3, stays named
    packed = pack24(w, E4M3, backend=backend)
    amax = w.float().abs().max()
    torch.testing.assert_close(packed.scale, amax / 448)
    assert packed.values.float().abs().max() == 448
    exact = w.float() / packed.scale
    # Half a unit in the last place: 2^-4 relative for normal numbers, 2^-10 for subnormal ones.
    error = (unpack24(packed, backend=backend) / packed.scale - exact).abs()
    assert (error <= exact.abs() * (2.0**-4 + 1e-6) + 2.0**-10).all()
    expected = pack24(w, E4M3, backend="reference")
    assert torch.equal(packed.buffer, expected.buffer)
    assert torch.equal(packed.scale, expected.scale)
    # Rounding is torch's own, to nearest even.
    rounded = (w.float() * packed.scale.reciprocal()).to(E4M3).float()
    assert torch.equal(unpack24(packed), rounded * packed.scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_given_scale(device, dtype, backend, monkeypatch):
    """Used as it is, without a look at the tensor; magnitudes beyond 448 * scale saturate."""
    w = sparse((64, 256), dtype, device)
    given = torch.tensor(0.003, device=device)
    monkeypatch.delattr(pack24_module, "scale_inv_of")
    w[0, :4] = torch.tensor([float("inf"), 0.0, -float("inf"), 0.0])
    w[1, :4] = torch.tensor([0.0, float("nan"), 0.0, 1.0])
    packed = pack24(w, E4M3, scale_inv=given, backend=backend)
    assert packed.scale is given
    values = w.float() / 0.003
    assert (values.abs() > 448).any() and (values.abs() < 100).any()
    dense = unpack24(packed, backend="reference")
    exact = values.clamp(-448, 448)
    error = (dense / given - exact).abs()
    assert dense[1, 1].isnan() and int(dense.isnan().sum()) == 1
    assert (error <= exact.abs() * (2.0**-4 + 1e-5) + 2.0**-10)[~dense.isnan()].all()
    assert dense[0, 0] == 448 * given and dense[0, 2] == -448 * given
    if backend == "triton":
        expected = pack24(w, E4M3, scale_inv=given, backend="reference")
        same = torch.equal(packed.metadata, expected.metadata)
        assert same and torch.equal(
            packed.values.float().nan_to_num(1e9), expected.values.float().nan_to_num(1e9)
        )


def test_refused_scales(device):
    w = sparse((64, 128), torch.bfloat16, device)
    one = torch.ones((), device=device)
    for arguments, match in (
        ({"w_sparse": w, "scale_inv": one}, "expected none to pack torch.bfloat16"),
        ({"w_sparse": w.to(E4M3), "scale_inv": one}, "expected none"),
        ({"w_sparse": w, "dtype": E4M3, "scale_inv": one.view(1)}, r"shape \(1,\)"),
        ({"w_sparse": w, "dtype": E4M3, "scale_inv": one.double()}, "float64"),
    ):
        with pytest.raises(KernelError, match=match):
            pack24(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_e4m3_number_survives(device, backend):
    """Quantizing numbers that are e4m3 already, with amax 448, changes none of them."""
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3).float().nan_to_num(448.0)
    w = torch.zeros(64, 128)
    w.view(-1, 4)[:256, 1] = numbers
    between = torch.nextafter(numbers.abs(), torch.tensor(0.0)) * numbers.sign()
    w.view(-1, 4)[:256, 2] = between
    packed = pack24(w.to(device), E4M3, backend=backend)
    assert packed.scale == 1
    dense = unpack24(packed, backend=backend).cpu().view(-1, 4)
    assert torch.equal(dense[:256, 1], numbers)
    assert torch.equal(dense[:256, 2], between.to(E4M3).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_extreme_tensors(device, backend):
    zero = pack24(torch.zeros(64, 128, device=device), E4M3, backend=backend)
    assert zero.scale == 1 and (unpack24(zero) == 0).all()
    tiny = torch.zeros(64, 128, device=device)
    tiny[0, 0] = 1e-40
    packed = pack24(tiny, E4M3, backend=backend)
    assert packed.scale.isfinite() and packed.scale > 0 and unpack24(packed).isfinite().all()
    for poison in (float("inf"), float("nan")):
        tiny[0, 0] = poison
        assert not unpack24(pack24(tiny, E4M3, backend=backend)).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_strided_inputs(device, dtype, backend):
    w = sparse((64, 256), dtype, device)
    bits = w.view(torch.int16 if dtype != E4M3 else torch.uint8)
    sliced = torch.cat([bits, bits], 1)[:, :256].view(dtype)
    shifted = torch.cat([bits[:, :2], bits], 1)[:, 2:].view(dtype)
    expected = pack24(w, backend=backend).buffer
    for view in (sliced, shifted, bits.t().contiguous().t().view(dtype)):
        assert not view.is_contiguous()
        assert torch.equal(pack24(view, backend=backend).buffer, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_rounded(device, dtype):
    w = sparse((64, 64), torch.float32, device)
    assert torch.equal(unpack24(pack24(w, dtype)), w.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*FORMATS, torch.float32])
def test_an_input_that_is_not_24(device, dtype, backend):
    """The error names the place; with a flag, CUDA does not raise."""
    for columns in ([40, 41, 42], [125, 126, 127], [0, 1, 2, 3], [64, 66, 67], [64, 65, 67]):
        w = sparse((128, 128), torch.float32, device)
        w[70, columns] = -1.0
        w = w.to(dtype)
        to = E4M3 if dtype == torch.float32 else dtype
        first = columns[0] // 4 * 4
        with pytest.raises(KernelError, match=f"row 70, columns {first} to {first + 3}"):
            pack24(w, to, backend=backend)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    if w.is_cuda:
        pack24(w, to, error_flag=flag, backend=backend)
        assert flag.item() == 1
        flag.zero_()
    pack24(sparse((128, 128), to, device), error_flag=flag, backend=backend)
    assert flag.item() == 0


def test_parts_from_elsewhere_are_joined():
    packed = pack24(sparse((64, 128), torch.bfloat16, "cpu"))
    parts = Packed24(
        packed.values.clone(), packed.metadata.clone(), packed.shape, packed.dtype, packed.scale
    )
    assert torch.equal(parts.buffer, packed.buffer)
    assert torch.equal(unpack24(parts), unpack24(packed))


@pytest.mark.parametrize(
    "w, dtype, match",
    [
        (torch.zeros(32, 64, dtype=torch.bfloat16), None, "multiples of"),
        (torch.zeros(64, 96, dtype=torch.bfloat16), None, "multiples of"),
        (torch.zeros(64, 64, dtype=torch.bfloat16), E4M3, "multiples of"),
        (torch.zeros(0, 64, dtype=torch.bfloat16), None, "multiples of"),
        (torch.zeros(64, dtype=torch.bfloat16), None, "multiples of"),
        (torch.zeros(64, 64), None, "dtype is torch.float32"),
        (torch.zeros(64, 128), torch.float8_e5m2, "float8_e5m2"),
        (torch.zeros(64, 64, dtype=torch.bfloat16), torch.float16, "wider"),
        (torch.zeros(64, 128, dtype=torch.float64), E4M3, "float64"),
    ],
)
def test_refusals(w, dtype, match):
    with pytest.raises(KernelError, match=match):
        pack24(w, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(128, 256), (64, 128), (256, 384), (4096, 4096)])
def test_equal_to_the_library_byte_for_byte(device, dtype, shape):
    """With two non-zeros in every group the packed form is unique."""
    w = sparse(shape, dtype, device, fewest=2)
    library = torch._cslt_compress(w).view(torch.uint8).reshape(-1)
    assert torch.equal(pack24(w).buffer, library)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_library_reads_fewer_non_zeros_alike(device, dtype):
    """Groups with zeros may name other columns there; both describe the same matrix."""
    w = sparse((256, 384), dtype, device)
    ours = pack24(w)
    library = torch._cslt_compress(w).view(torch.uint8).reshape(-1)
    size = ours.values.numel() * ours.values.element_size()
    values = library[:size].view(dtype).view(ours.values.shape)
    theirs = Packed24(values, library[size:], ours.shape, dtype, ours.scale)
    assert torch.equal(unpack24(theirs), unpack24(ours))
