"""What megasparse itself does over many ranks, without a model: set-up, agreement, save, resume.

    python -m tools.bench.ranks --ranks 8 16 32 64 --output after.json
    PYTHONPATH=/another/commit python tools/bench/ranks.py --ranks 8 16 32 --output before.json
    python -m tools.bench.growth before.json after.json --output TABLE.md

Forks N ranks of one process on this host, in a network namespace of their own where that is allowed
(else traffic is not counted). Each phase is measured on every rank: seconds from first to last, CPU
seconds of all ranks together, open files of ranks 0 and 1, packets and bytes on the wire, and files
that hosts share and that were opened: of the checkpoint, and of supervisors (`--max-restarts`).
In these and for the watchdog RANKS_A_HOST ranks are a host. `growth` fits laws `cost = a N^p`.
With many more ranks than cores wall times are those of the cores; CPU, traffic and open files carry
over to a cluster.

The script runs on older commits too: give their root in PYTHONPATH, and phases that they have.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import hashlib
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megasparse import log
from megasparse.atomic_files import write_text
from megasparse.checkpoint import directory, saver, writer
from megasparse.config import CheckpointConfig
from megasparse.distributed import control_plane, rendezvous
from megasparse.distributed.supervise import supervise
from megasparse.distributed.watchdog import Watchdog
from megasparse.sparsity.shard import WeightShard
from tools.bench.parts.counted_opens import CountedOpens, note
from tools.bench.parts.own_network import own_network, traffic

with contextlib.suppress(ImportError):  # an older commit: it has no phase `reshard`
    from megasparse.checkpoint.shared_reader import Ask, SharedReader

PHASES = (
    "meet",
    "control",
    "agree",
    "save",
    "choose",
    "load",
    "reshard",
    "watch",
    "beat",
    "restart",
)
AGREEMENTS = 20
RANKS_A_HOST = 8
BEATING_SECONDS = 2.0
# A training whose first attempt fails on all ranks, as after a verdict.
CHILD = '[ "$MEGASPARSE_ATTEMPT" != 0 ] || { sleep 2; exit 71; }'
KEYS, LENGTH = 8, 256  # tensors of a rank, entries of each
META: dict[str, Any] = {
    "consumed_samples": 0, "layout": {}, "optimizer_steps": 0, "digests": {}, "config": {},
    "state": {}, "versions": {},
}  # fmt: skip


def commit() -> str:
    """Of the megasparse that is measured."""
    root = str(Path(saver.__file__).parents[2])
    command = ["git", "-C", root, "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def sha256_rate(size: int = 1 << 24) -> float:
    """GB/s of SHA-256 on one core, the best of many: other programs may use it too."""
    content, best = bytes(size), 0.0
    for _ in range(100):
        begin = time.monotonic()
        hashlib.sha256(content).digest()
        best = max(best, size / (time.monotonic() - begin) / 1e9)
    return best


class Rank:
    """One rank: a phase after the other, as the parent asks for them."""

    def __init__(self, rank: int, world: int, port: int, root: Path) -> None:
        self.rank, self.world, self.root = rank, world, root
        self.control: Any = None
        self.watchdog: Any = None
        self.reader: Any = None
        self.opened = self.read = 0
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def run(self, phase: str) -> dict[str, Any]:
        """One phase: when it began and ended here, and what it cost."""
        self.opened = 0
        begin, cpu = time.monotonic(), time.process_time()
        getattr(self, phase)()
        return {
            "begin": begin,
            "end": time.monotonic(),
            "cpu": time.process_time() - cpu,
            "files": len(os.listdir("/proc/self/fd")),
            "opened": self.opened,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def meet(self) -> None:
        """Rendezvous and the world's group."""
        rendezvous.join_group(torch.device("cpu"), datetime.timedelta(minutes=20))

    def control_(self) -> None:
        """The control plane, and its first decision."""
        self.control = control_plane.make_control_plane()
        self.control.barrier()

    def agree(self) -> None:
        """Decisions between steps."""
        for _ in range(AGREEMENTS):
            self.control.max_over_ranks([0, self.rank, 0])

    def save(self) -> None:
        """A save of a few tensors, each divided over all ranks."""
        one = saver.Saver(self.root, self.control, "ab", keep_last=2)
        values = torch.full((LENGTH,), float(self.rank))
        shard, start = WeightShard((self.world * LENGTH,)), self.rank * LENGTH
        tensors = {
            f"param/{n}": (_piece(f"param/{n}", shard, start, start + LENGTH), values)
            for n in range(KEYS)
        }
        one.save(1, tensors, META)
        one.finish()

    def choose(self) -> None:
        """Which checkpoint a resumed run takes, verified."""
        with CountedOpens(self):
            self.reader = saver.choose(self.root, self.control)

    def load(self) -> None:
        """What a resumed rank reads: its own part of every tensor."""
        with CountedOpens(self):
            start = self.rank * LENGTH
            for n in range(KEYS):
                key, shard = f"param/{n}", WeightShard((self.world * LENGTH,))
                if hasattr(self.reader, "read_part"):
                    self.reader.search_first([[f"rank-{self.rank:05d}.safetensors"]])
                    own = self.reader.read_part(_piece(key, shard, start, start + LENGTH))
                else:
                    own = self.reader.read(key)[start : start + LENGTH]
                assert bool((own == self.rank).all())
            self.control.barrier()

    def reshard(self) -> None:
        """What a rank reads in another layout: half of its part, and half of the next one's."""
        length, start = self.world * LENGTH, self.rank * LENGTH + LENGTH // 2
        pieces = [
            _piece(f"param/{n}", WeightShard((length,)), start, min(start + LENGTH, length))
            for n in range(KEYS)
        ]
        with CountedOpens(self):
            reader = SharedReader(self.reader, self.control)
            reader.look_up({piece.key.split("/")[1]: Ask([piece]) for piece in pieces})
            parts = [reader.read_part(piece) for piece in pieces]
            reader.fetch()
        for part in parts:
            halves = part.split(LENGTH // 2)
            assert all(bool((half == self.rank + n).all()) for n, half in enumerate(halves))

    def watch(self) -> None:
        """The watchdog finds its host's leader, and that one rank 0."""
        address = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
        host = f"host {self.rank // RANKS_A_HOST}"
        self.watchdog = Watchdog(address, "0", self.rank, self.world, 600.0, self.root, host=host)
        self.control.barrier()

    def beat(self) -> None:
        """Heartbeats of a while in which nothing else happens."""
        time.sleep(BEATING_SECONDS)
        self.control.barrier()
        self.watchdog.stop()

    def restart(self) -> None:
        """Supervisors start children, and start them again when they have failed."""
        folder = str(self.root)
        settings: Any = CheckpointConfig(run_dir=folder, save=folder, max_restarts=1)
        os.environ["MEGASPARSE_LAUNCH"] = str(1 + self.rank // RANKS_A_HOST)
        with CountedOpens(self):
            code = supervise(settings, ["sh", "-c", CHILD], self.rank, lambda: -1)
        assert code == 0, code


def _piece(*arguments: Any) -> Any:
    """Of the commit that is measured: older ones define it elsewhere."""
    return vars(writer)["Piece"](*arguments)


def serve(rank: Rank, commands: Any, answers: Any) -> None:
    """In a child: a phase for each line, an answer in JSON for each phase."""
    sys.addaudithook(note)
    try:
        for line in commands:
            phase = line.strip()
            answer = rank.run("control_" if phase == "control" else phase)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    except BaseException:
        answers.write(json.dumps({"error": f"rank {rank.rank}: {traceback.format_exc()}"}) + "\n")
        answers.flush()


def measure(world: int, counted: bool, phases: Sequence[str]) -> dict[str, Any]:
    """These phases with so many ranks."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ranks: list[int] = []
        ends: list[Any] = []
        gc.freeze()
        for rank in range(world):
            down, up = os.pipe(), os.pipe()
            child = os.fork()
            if child == 0:
                for end in ends:
                    for stream in end:
                        stream.close()
                os.close(down[1])
                os.close(up[0])
                with open(down[0]) as commands, open(up[1], "w") as answers:
                    serve(Rank(rank, world, port, Path(folder)), commands, answers)
                os._exit(0)
            os.close(down[0])
            os.close(up[1])
            ranks.append(child)
            ends.append((os.fdopen(down[1], "w"), os.fdopen(up[0])))
        try:
            found = {phase: _phase(phase, ends, counted) for phase in phases}
            for phase, times in (("agree", AGREEMENTS), ("beat", BEATING_SECONDS)):
                found[phase] = {
                    key: value if key.startswith("files") else value / times
                    for key, value in found.get(phase, {}).items()
                }
            manifest = directory.step_folder(Path(folder), 1) / "manifest.json"
            if manifest.exists():
                found["save"]["manifest_bytes"] = manifest.stat().st_size
            return found
        finally:
            for child, end in zip(ranks, ends, strict=True):
                for stream in end:
                    stream.close()
                os.kill(child, 9)
                os.waitpid(child, 0)


def _phase(phase: str, ends: list[Any], counted: bool) -> dict[str, float]:
    before = traffic()
    for down, _ in ends:
        down.write(f"{phase}\n")
        down.flush()
    answers = [json.loads(up.readline()) for _, up in ends]
    after = traffic()
    for answer in answers:
        if "error" in answer:
            raise SystemExit(answer["error"])
    found = {
        "seconds": max(a["end"] for a in answers) - min(a["begin"] for a in answers),
        "cpu_seconds": sum(a["cpu"] for a in answers),
        "cpu_seconds_rank_0": answers[0]["cpu"],
        "files_rank_0": answers[0]["files"],
        "files_rank_1": answers[1]["files"],
    }
    if counted:
        found |= {"bytes": after[0] - before[0], "packets": after[1] - before[1]}
    if phase in ("choose", "load", "reshard", "restart"):
        found["opened"] = sum(a["opened"] for a in answers)
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--output", type=Path, help="JSON file of the measurements")
    args = parser.parse_args(argv)
    log.setup(0, "error")
    torch.set_num_threads(1)
    counted = own_network()
    result: dict[str, Any] = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sha256_gbps": sha256_rate(),
        "ranks": {},
    }
    for world in args.ranks:
        begin = time.monotonic()
        result["ranks"][str(world)] = measure(world, counted, args.phases)
        sys.stderr.write(f"{world} ranks: {time.monotonic() - begin:.0f} s\n")
        text = json.dumps(result, indent=1) + "\n"
        if args.output is not None:
            write_text(args.output, text)
    if args.output is None:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
