"""Exchanges through opened memory are NCCL's collectives: the same values, replayed too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megasparse.megatron.comm.peer_memory import PeerMemory, peer_memory
from tests.dist import free_port

ROOT = Path(__file__).parents[2]
DTYPES = (torch.bfloat16, torch.float32, torch.uint8)
SHAPES = ((2, 3), (64, 1, 128), (4098, 515), (1, 7))


def test_only_gpus_open_their_memory():
    assert peer_memory(None, torch.device("cpu")) is None  # type: ignore[arg-type]


@pytest.mark.gpu
def test_exchanges_are_collectives():
    """Needs two GPUs of one host."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--master-port", str(free_port())]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *launcher, __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.count("all equal") == 2


def _values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype, device="cuda")
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def _gathered(x: torch.Tensor) -> torch.Tensor:
    whole = x.new_empty((x.shape[0] * dist.get_world_size(), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x)
    return whole


def _summed(z: torch.Tensor) -> torch.Tensor:
    part = z.new_empty((z.shape[0] // dist.get_world_size(), *z.shape[1:]))
    dist.reduce_scatter_tensor(part, z)
    return part


def _one_of_each(peers: PeerMemory) -> None:
    """All dtypes and shapes; memory grows, and one exchange follows itself."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for number, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            x = _values(shape, dtype, 10 * number + rank)
            whole, arrived = peers.gather("gather", x)
            arrived()
            assert torch.equal(whole, _gathered(x)), (shape, dtype)
            if dtype != torch.uint8:
                z = _values((shape[0] * world, *shape[1:]), dtype, 100 + 10 * number + rank)
                part, wait = peers.reduce("sum", z)
                wait()
                assert torch.equal(part, _summed(z)), (shape, dtype)


def _replayed(peers: PeerMemory) -> None:
    """A graph with exchanges beside a computation, many times, while ranks are not in step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, weight = (_values((512, 512), torch.bfloat16, seed) for seed in (rank, 7))

    def body() -> torch.Tensor:
        whole, arrived = peers.gather("gather", x)
        beside = x @ weight
        arrived()
        part, wait = peers.reduce("sum", whole @ weight)
        again, arrived = peers.gather("gather", beside)
        wait()
        arrived()
        return part + again[rank * 512 : (rank + 1) * 512]

    eager = body()
    expected = _summed(_gathered(x) @ weight) + x @ weight
    assert torch.equal(eager, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = body()
    for number in range(200):
        x.copy_(_values(tuple(x.shape), x.dtype, number * world + rank))
        if number % 3 == rank:
            torch.cuda._sleep(200_000)
        graph.replay()
        if number % 20 == 0:
            assert torch.equal(found, _summed(_gathered(x) @ weight) + x @ weight), number
    torch.cuda.synchronize()


def _main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    peers = peer_memory(dist.group.WORLD, device)
    assert peers is not None, "the GPUs do not open their memory to each other"
    _one_of_each(peers)
    _replayed(peers)
    print("all equal", flush=True)
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)  # graphs refer to the communicators


if __name__ == "__main__":
    _main()
