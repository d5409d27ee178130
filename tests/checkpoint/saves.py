"""Saves in a process that is killed at random instants; and damage to checkpoints on disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint import directory
from megasparse.checkpoint.manifest import MANIFEST, encode_manifest
from megasparse.checkpoint.pieces import Piece
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saver import Saver, choose
from megasparse.checkpoint.writer import Tensors, ignore, publish, write_rank_file
from megasparse.distributed.control_plane import ControlPlane
from megasparse.errors import CheckpointError
from megasparse.sparsity.shard import WeightShard

META: dict[str, Any] = {
    "consumed_samples": 0, "layout": {}, "optimizer_steps": 0, "digests": {}, "config": {},
    "state": {}, "versions": {},
}  # fmt: skip


def tensors_of(step: int) -> Tensors:
    """A state whose every value tells its step (modulo 256)."""
    return {
        name: (
            Piece(name, WeightShard((40, 30))),
            torch.full((40, 30), float(step % 256), dtype=dtype),
        )
        for name, dtype in (("a", torch.float32), ("b", torch.bfloat16), ("c", torch.uint8))
    }


def check_content(reader: CheckpointReader) -> None:
    """The values are those of the step that the checkpoint claims."""
    step = reader.meta["step"]
    for key in list(reader.keys()):
        value = reader.read(key)
        assert torch.equal(value, tensors_of(step)[key][1]), (reader.folder, key)


def write_checkpoint(root: Path, step: int, ranks: int = 2, run_id: str = "ab") -> Path:
    """A checkpoint of several ranks' files, without the ranks."""
    temporary = root / f"step-{step:08d}.tmp-{run_id}"
    temporary.mkdir(parents=True)
    binding = {"run_id": run_id, "step": step}
    files: dict[str, Any] = {}
    for rank in range(ranks):
        tensors: Tensors = {}
        for name, (_, whole) in tensors_of(step).items():
            shard = WeightShard((40, 30), 0, rank, ranks)
            tensors[name] = (Piece(name, shard), shard.slice_of(whole))
        files |= write_rank_file(temporary, rank, tensors, binding)
    final = directory.step_folder(root, step)
    publish(temporary, final, files, {**META, "run_id": run_id, "step": step})
    directory.write_pointer(root, step)
    return final


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another manifest, in order and with its own digest, but for the change."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for key in ("format", "sha256"):
        manifest.pop(key)
    change(manifest)
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))


def rewrite_pieces(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Another list of pieces in the first file, with the digests to match, but for the change."""
    path = folder / "rank-00000.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    pieces = json.loads(header["__metadata__"]["pieces"])
    change(pieces)
    header["__metadata__"]["pieces"] = json.dumps(pieces)
    text = json.dumps(header).encode()
    text = len(text).to_bytes(8, "little") + text
    path.write_bytes(text + content[end:])
    entry = {
        "size": len(text) + len(content) - end,
        "header_sha256": hashlib.sha256(text).hexdigest(),
    }
    rewrite(folder, lambda manifest: manifest["files"].update({path.name: entry}))


def save_until_killed(root: Path, pipe: int, hook: Callable[[str], None], async_save: bool) -> None:
    """In a child: tidy up, continue after the newest checkpoint, tell every published step."""
    directory.clean(root)
    reader = choose(root, ControlPlane(None))
    step = reader.meta["step"] + 1 if reader else 1
    saver = Saver(root, ControlPlane(None), os.urandom(8).hex(), 2, async_save, hook=hook)
    os.write(pipe, bytes(8))  # ready
    while True:
        # Every third step is saved twice: the second replaces a good checkpoint of its name.
        for _ in range(2 if step % 3 == 0 else 1):
            saver.save(step, tensors_of(step), META)
            saver.finish()
        os.write(pipe, step.to_bytes(8, "little"))
        step += 1


def kill_one_save(
    root: Path, delay: float | None, point: str | None = None, async_save: bool = False
) -> tuple[int, int]:
    """Start a saving process, kill it (or let it strike itself), and look at what is left.

    Args:
        delay: from its first save on; None: it strikes itself at `point`.

    Returns:
        The newest intact step, and the last one that the process said was published.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def strike(name: str) -> None:
            if name == point:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            save_until_killed(root, writing, strike if point else ignore, async_save)
        except BaseException:
            (root.parent / f"{root.name}-error").write_text(traceback.format_exc())
        finally:
            os._exit(1)
    os.close(writing)
    told = os.read(reading, 8)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed, (root.parent / f"{root.name}-error").read_text()
    while part := os.read(reading, 1 << 16):
        told += part
    os.close(reading)
    last = int.from_bytes(told[-8:], "little") if told else 0
    # As the next run does: first put back what an interrupted replacement set aside.
    directory.clean(root)
    reader = choose(root, ControlPlane(None))
    if reader is not None:
        check_content(reader)
    for step in directory.list_steps(root):  # what is published is whole, never merely newest
        CheckpointReader(directory.step_folder(root, step))
    return (reader.meta["step"] if reader else 0), last


def save_kills(root: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Kill `count` saving processes at random instants; nothing published may be lost.

    Returns:
        kills; lost: times that a published checkpoint was not there afterwards; steps published.
    """
    generator = random.Random(seed)
    lost = newest = 0
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        # Until one was published they live longer: a busy machine saves slowly.
        delay = generator.uniform(0.0, 0.04 if newest else 0.4)
        found, told = kill_one_save(root, delay, async_save=number % 2 == 1)
        lost += found < max(told, newest)
        newest = found
    return {"kills": count, "lost": lost, "steps_published": newest}


def damages(root: Path, newest: Path, other: Path, generator: random.Random) -> tuple[str, Any]:
    """One random damage to the newest checkpoint: its kind, and a function that repairs it."""
    files = sorted(path for path in newest.iterdir())
    path = generator.choice(files)
    content = path.read_bytes()
    kind = generator.choice(["flip"] * 6 + ["truncate", "delete", "swap", "foreign", "empty"])
    if kind == "flip":
        damaged = bytearray(content)
        bit = generator.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
    elif kind == "truncate":
        path.write_bytes(content[: generator.randrange(len(content))])
    elif kind == "delete":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "swap":
        first, second = (newest / f"rank-0000{rank}.safetensors" for rank in (0, 1))
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])

        def swap_back() -> None:
            first.write_bytes(contents[0])
            second.write_bytes(contents[1])

        return kind, swap_back
    else:
        path.write_bytes((other / path.name).read_bytes())
    return kind, lambda: path.write_bytes(content)


def corruption(root: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Damage the newest of two checkpoints `count` times; each time the older must be taken.

    Returns:
        trials, undetected, wrong_fallback, and the trials by kind.
    """
    generator = random.Random(seed)
    shutil.rmtree(root, ignore_errors=True)
    older, newest = write_checkpoint(root, 1), write_checkpoint(root, 2)
    # Same step and shapes, other run and values.
    foreign = write_checkpoint(root.with_name(f"{root.name}-other"), 2, run_id="cd")
    result = {"trials": count, "undetected": 0, "wrong_fallback": 0}
    for _ in range(count):
        kind, repair = damages(root, newest, generator.choice([older, foreign]), generator)
        result[kind] = result.get(kind, 0) + 1
        try:
            CheckpointReader(newest)
            result["undetected"] += 1
        except CheckpointError:
            pass
        reader = choose(root, ControlPlane(None))
        result["wrong_fallback"] += reader is None or reader.folder != older
        repair()
    assert (
        choose(root, ControlPlane(None)).folder == newest
    )  # all repaired: the damage was the cause
    shutil.rmtree(root.with_name(f"{root.name}-other"))
    assert (newest / MANIFEST).exists()
    return result
