"""What one rank knows of its host, as JSON, for `host_rules` to compare over all ranks.

Nothing here raises for what it finds, and nothing takes longer than reading a few files, but for
the parts that a full preflight adds: bytes of the data, a product on the GPU, nvidia-smi.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

from megasparse.config import ResolvedConfig
from megasparse.data.check import CheckedData
from megasparse.distributed import descriptors
from megasparse.distributed.interfaces import interface_towards, local_address
from megasparse.errors import MegasparseError
from megasparse.input_files import open_regular

PACKAGES = (
    "deepspeed", "megatron-core", "transformer-engine", "triton", "numpy", "safetensors",
    "sentencepiece", "tokenizers",
)  # fmt: skip
SAMPLE_BYTES = 1 << 20
SAMPLES = 16
_CGROUP = Path("/sys/fs/cgroup")
# What nvidia-smi tells of a GPU that should not be used; all "0", "No" or "Not Active" when well.
_SMI = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors",
    "retired_pages.pending": "memory pages waiting to be retired",
    "clocks_throttle_reasons.hw_slowdown": "slowed down by heat or power",
}


def facts(config: ResolvedConfig, data: CheckedData | None, full: bool) -> dict[str, Any]:
    """Everything about this rank's host.

    Args:
        config: of the run.
        data: checked; None when that failed, or is none of this preflight's business.
        full: also what takes seconds.
    """
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "address": local_address(master),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME") or interface_towards(master),
        "versions": versions(),
        "source": source_digest(),
        "gpu": _gpu(full),
        "memory": available_memory(),
        "disk": free_disk(Path(config.checkpoint.save)),
        "data": data.digests if data is not None else {},
        "descriptors": descriptors.raise_limit(),
    }
    if full and data is not None:
        found["data"] = {**found["data"], **_data_samples(data)}
    return found


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on."""
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
    }
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _driver()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


@functools.cache
def source_digest() -> str:
    """Of megasparse's own files: nodes without a shared file system may have other commits."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def available_memory() -> int:
    """Bytes of host memory that processes can still have (also by the control group)."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    found = int(fields["MemAvailable"]) * 1024
    try:
        limit, used = (
            (_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current")
        )
    except OSError:
        return found
    return found if limit == "max" else min(found, int(limit) - int(used))


def free_disk(folder: Path) -> dict[str, Any]:
    """Free bytes where a folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return {"path": str(folder.absolute()), "free": shutil.disk_usage(folder).free}


def _data_samples(data: CheckedData) -> dict[str, str]:
    """Digests of bytes over the whole length of every dataset, as this host reads them."""
    found = {}
    for group in data.sources.values():
        for source in group:
            path = Path(f"{source.prefix}.bin")
            digest = hashlib.sha256()
            try:
                with open_regular(path) as stream:
                    size = os.fstat(stream.fileno()).st_size
                    digest.update(str(size).encode())
                    for number in range(SAMPLES):
                        stream.seek(max(size - SAMPLE_BYTES, 0) * number // (SAMPLES - 1))
                        digest.update(stream.read(SAMPLE_BYTES))
                found[f"bytes of {path}"] = digest.hexdigest()
            except OSError as error:
                found[f"bytes of {path}"] = f"cannot be read: {error.strerror}"
    return found


def _gpu(full: bool) -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    problems = [*_wrong_product(device), *_smi_problems(device)] if full else []
    return {
        "name": properties.name,
        "memory": total,
        "free": free,
        "capability": f"{properties.major}.{properties.minor}",
        "problems": problems,
    }


def _wrong_product(device: int) -> list[str]:
    """A product whose result is known exactly, over all multiprocessors."""
    try:
        a = torch.ones(4096, 4096, dtype=torch.bfloat16, device=f"cuda:{device}")
        wrong = int((a @ a != 4096.0).sum())
    except RuntimeError as error:
        return [f"a matrix product failed: {' '.join(str(error).split())}"]
    return [f"a matrix product has {wrong} wrong entries"] if wrong else []


def _smi_problems(device: int) -> list[str]:
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    command = [
        "nvidia-smi",
        f"--id=GPU-{uuid.removeprefix('GPU-')}",
        f"--query-gpu={','.join(_SMI)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not answer: {type(error).__name__}"]
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())
        # A driver that calls one of them otherwise says nothing about the GPU.
        return [] if "not a valid field" in words else [f"nvidia-smi: {words}"]
    values = [value.strip() for value in done.stdout.strip().split(",")]
    well = ("0", "No", "Not Active", "[N/A]", "[Not Supported]", "N/A")
    return [
        f"{meaning} ({value})"
        for meaning, value in zip(_SMI.values(), values, strict=False)
        if value not in well
    ]


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"(\d+\.\d+(\.\d+)?)", text)
    return match.group(1) if match else "unknown"


def failed(error: MegasparseError) -> dict[str, Any]:
    """The facts of a host whose configuration or data cannot even be read."""
    return {"host": socket.gethostname(), "error": f"{type(error).__name__}: {error}"}
