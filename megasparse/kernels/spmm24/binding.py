"""cuSPARSELt, bound directly: plans are made once a shape and kept.

torch's wrapper makes descriptors, plan and workspace anew at every call, which costs the host more
than a small product costs the device, and it does not know e5m2. Here a call on a kept plan is one
foreign-function call.

The library multiplies a sparse A (N, K), row-major and packed, by a dense B (K, M):

    D (N, M) = alpha * A @ B + bias   alpha on the host, bias (N,) on the device

What it was seen to do on an H200 (0.8.0): 16-bit operands of one type in any order of B and D;
e4m3 x e4m3 and e5m2 x e5m2 with both running along K (mixed pairs: "operation not supported"),
results in bf16, fp16 or fp32. Scales on the device (CUSPARSELT_MATMUL_A_SCALE_POINTER) are accepted
for 8-bit operands and silently ignored: scales must be in alpha.

Structures, enumerators and prototypes are those of cusparseLt.h 0.8.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from megasparse.errors import KernelError
from megasparse.kernels.accumulate import accumulate_
from megasparse.kernels.factors import Factors

CUDA_TYPES = {
    torch.float32: 0,
    torch.float16: 2,
    torch.bfloat16: 14,
    torch.float8_e4m3fn: 28,
    torch.float8_e5m2: 29,
}
_COMPUTE_32F = 2
_ORDER_COLUMN, _ORDER_ROW = 1, 2
_ALIGNMENT = 16
_STRUCT_BYTES = 512
_ALGORITHM_ID = 0  # of cusparseLtMatmulAlgAttribute_t
_BIAS_POINTER = 8  # of cusparseLtMatmulDescAttribute_t
_ONE_STREAM = ctypes.c_int(1)


class Problem(NamedTuple):
    """What a plan is made for.

    Attributes:
        rows, inner, columns: N, K and M.
        sparse_type, dense_type, out_type: of A, B and D.
        b_rows: B is row-major; else column-major, that is a row-major (M, K).
        d_rows: D is row-major; else column-major, that is a row-major (M, N).
        algorithm: id of the library's.
        biased: a bias is added.
    """

    rows: int
    inner: int
    columns: int
    sparse_type: torch.dtype
    dense_type: torch.dtype
    out_type: torch.dtype
    b_rows: bool
    d_rows: bool
    algorithm: int
    biased: bool = False


class Library:
    """The shared library, with the functions that are used declared and their statuses checked.

    Raises:
        KernelError: it cannot be loaded.
    """

    def __init__(self) -> None:
        try:
            # PyDLL: calls keep the interpreter's lock, so that no two threads are in a handle.
            self._library = ctypes.PyDLL("libcusparseLt.so.0")
        except OSError as error:
            raise KernelError(f"cuSPARSELt cannot be loaded: {error}") from error
        self._library.cusparseLtGetErrorString.restype = ctypes.c_char_p

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, f"cusparseLt{name}")

        def call(*arguments: Any) -> None:
            status = function(*arguments)
            if status:
                text = self._library.cusparseLtGetErrorString(status).decode()
                raise RuntimeError(f"cusparseLt{name}: status {status}, {text}")

        setattr(self, name, call)
        return call


@functools.cache
def library() -> Library:
    """cuSPARSELt, loaded at the first use (torch has it in the process already)."""
    return Library()


class _Struct:
    """One of the library's opaque structures: 512 bytes, aligned to 16."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_STRUCT_BYTES + _ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self._as_parameter_ = ctypes.c_void_p(start + (-start) % _ALIGNMENT)


@functools.cache
def _handle(device: torch.device) -> _Struct:
    handle = _Struct()
    with torch.cuda.device(device):
        library().Init(handle)
    return handle


_workspaces: dict[tuple[torch.device, int], torch.Tensor] = {}
_outgrown: list[torch.Tensor] = []


def _workspace(device: torch.device, stream: int, size: int) -> int | None:
    """Address of at least `size` bytes that the products of a stream share, one after the other.

    Captured products keep the address that they were captured with.
    """
    if not size:
        return None
    held = _workspaces.get((device, stream))
    if held is None or held.numel() < size:
        if torch.cuda.is_current_stream_capturing():
            raise KernelError(
                f"cuSPARSELt: a workspace of {size} bytes is asked for while a step is captured; "
                "reserve_workspace was not called for the stream, or the product has not run yet"
            )
        if held is not None:
            _outgrown.append(held)  # a captured product may still write to it
        held = _workspaces[device, stream] = torch.empty(size, dtype=torch.uint8, device=device)
    return held.data_ptr()


def reserve_workspace(stream: torch.cuda.Stream) -> None:
    """Give a stream a workspace for every product that has run on its device so far.

    To be called before products are captured on it: during a capture none is made, as it would lie
    in the memory pool of the graph.
    """
    device = torch.device(stream.device)
    sizes = [held.numel() for (where, _), held in _workspaces.items() if where == device]
    if sizes:
        _workspace(device, stream.cuda_stream, max(sizes))


class Plan:
    """The library's plan of one problem on one device.

    Raises:
        RuntimeError: the library does not have it (a type, an order, an algorithm).
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._problem, self._device = problem, device
        self._handle = _handle(device)
        self._matrices = [_Struct() for _ in range(3)]
        self._matmul, self._selection, self._plan = _Struct(), _Struct(), _Struct()
        # A plan knows the address of its bias: those of products are written there.
        self._bias: torch.Tensor | None = None
        if problem.biased:
            self._bias = torch.zeros(problem.rows, dtype=problem.out_type, device=device)
            self._always = torch.ones(1, dtype=torch.int64, device=device)
        with torch.cuda.device(device):
            self._describe_matrices()
            self._describe_product()
        size = ctypes.c_size_t()
        library().MatmulGetWorkspace(self._handle, self._plan, ctypes.byref(size))
        self._workspace_bytes = size.value
        self._alpha, self._beta = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._alpha_place, self._beta_place = ctypes.byref(self._alpha), ctypes.byref(self._beta)

    def _describe_matrices(self) -> None:
        p, lib = self._problem, library()
        types = [ctypes.c_int(CUDA_TYPES[t]) for t in (p.sparse_type, p.dense_type, p.out_type)]
        a, b, d = self._matrices
        alignment = ctypes.c_uint32(_ALIGNMENT)
        n, k, m = (ctypes.c_int64(size) for size in (p.rows, p.inner, p.columns))
        order_b, ld_b = (_ORDER_ROW, m) if p.b_rows else (_ORDER_COLUMN, k)
        order_d, ld_d = (_ORDER_ROW, m) if p.d_rows else (_ORDER_COLUMN, n)
        lib.StructuredDescriptorInit(
            self._handle, a, n, k, k, alignment, types[0], ctypes.c_int(_ORDER_ROW), ctypes.c_int(0)
        )
        lib.DenseDescriptorInit(
            self._handle, b, k, m, ld_b, alignment, types[1], ctypes.c_int(order_b)
        )
        lib.DenseDescriptorInit(
            self._handle, d, n, m, ld_d, alignment, types[2], ctypes.c_int(order_d)
        )

    def _describe_product(self) -> None:
        p, lib = self._problem, library()
        a, b, d = self._matrices
        none = ctypes.c_int(0)
        lib.MatmulDescriptorInit(
            self._handle, self._matmul, none, none, a, b, d, d, ctypes.c_int(_COMPUTE_32F)
        )
        if self._bias is not None:
            address = ctypes.c_void_p(self._bias.data_ptr())
            lib.MatmulDescSetAttribute(
                self._handle,
                self._matmul,
                ctypes.c_int(_BIAS_POINTER),
                ctypes.byref(address),
                ctypes.c_size_t(ctypes.sizeof(address)),
            )
        lib.MatmulAlgSelectionInit(self._handle, self._selection, self._matmul, none)
        algorithm = ctypes.c_int(p.algorithm)
        lib.MatmulAlgSetAttribute(
            self._handle,
            self._selection,
            ctypes.c_int(_ALGORITHM_ID),
            ctypes.byref(algorithm),
            ctypes.c_size_t(ctypes.sizeof(algorithm)),
        )
        lib.MatmulPlanInit(self._handle, self._plan, self._matmul, self._selection)

    def set_bias(self, bias: torch.Tensor, factors: Factors | None) -> None:
        """What products add from now on, on the current stream: a bias (N,) times factors."""
        assert self._bias is not None
        accumulate_(self._bias, bias, factors=factors, begins=self._always)

    def run(self, packed: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        """`out = alpha * A @ B`, plus the bias that was set, on the current stream."""
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        self.launch(packed.data_ptr(), b.data_ptr(), out.data_ptr(), alpha, stream)

    def launch(self, packed: int, b: int, out: int, alpha: float, stream: int) -> None:
        """The same by addresses, on any stream of the device."""
        self._alpha.value = alpha
        result = ctypes.c_void_p(out)
        library().Matmul(
            self._handle,
            self._plan,
            self._alpha_place,
            ctypes.c_void_p(packed),
            ctypes.c_void_p(b),
            self._beta_place,
            result,
            result,
            ctypes.c_void_p(_workspace(self._device, stream, self._workspace_bytes)),
            ctypes.byref(ctypes.c_void_p(stream)),
            _ONE_STREAM,
        )


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, device: torch.device) -> Plan:
    """The kept plan of a problem."""
    return Plan(problem, device)
