"""Short runs on one or several ranks, measured: losses, seconds a step, memory.

For the tools that compare layouts or check estimates. `launch` starts the ranks by
torch.distributed.run; each trains the given jobs one after the other, and the first writes a file a
job. A job that has its file is not run again, so that a measurement which was cut off goes on.

    results = launch({"tp 2": {"flags": [...], "steps": 20}}, ranks=2, device="cuda")
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megasparse.atomic_files import write_json

ROOT = Path(__file__).resolve().parents[2]
# What to run: {"flags": [...], "steps": n}, and "profile": True if one step more is to be profiled.
Job = dict[str, Any]
# What `measure` returns.
Result = dict[str, Any]


def measure(flags: Sequence[str], steps: int, profile: bool = False) -> Result:
    """Train `steps` steps in this rank's process group.

    Returns:
        losses and seconds of every step; tokens of a step; a digest of the samples; parameters of
        the model; memory, the peak of this rank's device in GiB beyond what it held before;
        hardware and torch. With `profile`, on GPUs, seconds of a further step of this rank:
        computing, covered (by any kernel), and kernels by class.
    """
    import gc

    import torch

    from megasparse.megatron.import_without_compile import import_megatron
    from tools.bench.parts.profiling import profiled

    import_megatron()  # before the imports that need it
    from megasparse.config import load_config, padded_vocab_size, resolve
    from megasparse.config.shapes import parameter_count
    from megasparse.megatron.data.batches import batches, build_data, samples_digest
    from megasparse.megatron.grid import make_grid
    from megasparse.sparsity.run_recipe import recipe_of
    from megasparse.train.build import build_engine
    from megasparse.train.engine.deepspeed import fix_order_of_sums, start_process

    world = int(os.environ["WORLD_SIZE"])
    config = resolve(load_config(flags), world)
    parallel, train = config.parallel, config.train
    if train.deterministic_mode:
        fix_order_of_sums()
    device = start_process(parallel.distributed_timeout_minutes)
    cuda = device.type == "cuda"
    gc.collect()  # of the run before
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    grid = make_grid(
        tp,
        device,
        train.seed,
        pipeline_model_parallel_size=pp,
        context_parallel_size=parallel.context_parallel_size,
    )
    data = build_data(config, grid)
    vocabulary = padded_vocab_size(data.vocab_size, config)
    engine = build_engine(config, grid, recipe_of(config), vocabulary)
    stream = batches(data.streams["train"], config, grid, 0)
    losses, seconds = [], []
    for _ in range(steps):
        begin = time.monotonic()
        losses.append(engine.train_step(stream).loss)  # reads the loss: the device is done
        seconds.append(time.monotonic() - begin)
    result = {
        "losses": losses,
        "seconds": seconds,
        "tokens": train.global_batch_size * config.model.seq_length,
        "samples": samples_digest(data.streams["train"], 0, steps * train.global_batch_size),
        "parameters": parameter_count(config.model, vocabulary),
        "memory": (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0.0,
        "hardware": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
    }
    if profile and cuda:
        found = profiled(lambda: engine.train_step(stream), 1)
        result |= {
            "computing": found.computing,
            "covered": found.covered,
            "kernels": found.device_seconds,
        }
    return result


def stand_alone() -> None:
    """Make this process the only rank of a run, unless a launcher has made it a rank."""
    with socket.socket() as probe:  # a free port
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": port}.items():
        os.environ.setdefault(name, value)


def launch(
    jobs: Mapping[str, Job],
    ranks: int,
    device: str,
    folder: Path | None = None,
    gpus: Sequence[str] = (),
) -> dict[str, Result]:
    """Run jobs on `ranks` ranks, in order.

    Args:
        device: "cuda" or "cpu".
        folder: keeps a file a finished job; default: none is kept.
        gpus: names for CUDA_VISIBLE_DEVICES; default: all that are visible. Ranks share them if
            they are more (`_take_gpu`): good for results, not for times.

    Raises:
        SystemExit: the ranks failed.
    """
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        place = Path(place)
        place.mkdir(parents=True, exist_ok=True)
        if missing := {name: job for name, job in jobs.items() if not _read(place, name, job)}:
            _start(missing, ranks, device, place, gpus)
        results = {name: _read(place, name, job) for name, job in jobs.items()}
        return {name: result for name, result in results.items() if result is not None}


def _start(
    jobs: Mapping[str, Job], ranks: int, device: str, place: Path, gpus: Sequence[str]
) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    if device == "cpu" or gpus:
        environment["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else ",".join(gpus)
    shared = gpus if 0 < len(gpus) < ranks else ()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "--module",
        "tools.bench.parts.short_runs",
        str(place),
        json.dumps(jobs),
        *shared,
    ]
    where = f" on {len(shared)} GPUs" if shared else ""
    print(f"{len(jobs)} runs on {ranks} ranks{where}", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"the runs on {ranks} ranks ended with code {done.returncode}")


def _file(place: Path, name: str) -> Path:
    return place / f"{re.sub('[^a-z0-9_]+', '-', name.lower())}.json"


def _read(place: Path, name: str, job: Job) -> Result | None:
    """The result, if this very job has run to its end."""
    path = _file(place, name)
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return kept["result"] if kept["job"] == job else None


def _take_gpu(gpus: Sequence[str]) -> None:
    """Give this rank one of fewer GPUs than ranks.

    NCCL refuses two ranks on a GPU of one host. So each says that it is a host of its own, and they
    talk over sockets on loopback.
    """
    rank = int(os.environ["RANK"])
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)],
        "LOCAL_RANK": "0",
        "NCCL_HOSTID": f"rank-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
    }


def worker(place: Path, jobs: Mapping[str, Job]) -> None:
    """One rank: all jobs, one after the other."""
    from megasparse.train.engine.deepspeed import stop_process

    for name, job in jobs.items():
        began = time.monotonic()
        result = measure(**job)
        if os.environ["RANK"] == "0":
            loss, seconds = result["losses"][-1], time.monotonic() - began
            print(f"  {name}: loss {loss:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
            write_json(_file(place, name), {"job": job, "result": result})
    stop_process()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        _take_gpu(sys.argv[3:])
    worker(Path(sys.argv[1]), json.loads(sys.argv[2]))
