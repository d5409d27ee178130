"""Files made to run code, put wherever a run reads; none of them may."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megasparse.checkpoint.manifest import MANIFEST
from tests import forked, forkserver
from tests.checkpoint.saves import rewrite, rewrite_pieces
from tests.runs import TINY, make_dataset

# Nothing of this happens in a run after its imports.
FORBIDDEN = (
    "pickle.find_class", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork",
    "pty.spawn", "ftplib.connect", "urllib.Request", "shutil.unpack_archive", "webbrowser.open",
)  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """One file or setting, and what the run may answer.

    Attributes:
        plant: puts it into a folder with `data.*` and a run `run` that was cut off at step 2.
        flags: of the run that meets it; none: `--resume`.
        codes: exit codes: of a refusal, or 0 where the file has no part in the run.
    """

    name: str
    plant: Callable[[Path], Any]
    flags: Callable[[Path], list[str]]
    codes: tuple[int, ...]


class _Payload:
    """Unpickled, it runs a command."""

    def __init__(self, command: str, how: str = "system") -> None:
        self._command, self._how = command, how

    def __reduce__(self) -> Any:
        if self._how == "system":
            return os.system, (self._command,)
        if self._how == "eval":
            return eval, (f"__import__('os').system({self._command!r})",)
        if self._how == "exec":
            return exec, (f"import os; os.system({self._command!r})",)
        import subprocess

        return subprocess.call, (["sh", "-c", self._command],)


def pickled(root: Path, how: str = "system") -> bytes:
    """A pickle that makes `marker` in the folder when it is loaded."""
    return pickle.dumps(_Payload(f"touch {root / 'marker'}", how))


def _torch_saved(root: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"x": _Payload(f"touch {root / 'marker'}")}, stream)
    return stream.getvalue()


def _object_array(root: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([_Payload(f"touch {root / 'marker'}")], dtype=object))
    return stream.getvalue()


def _zip(root: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("archive/data.pkl", "../../marker", "/tmp/marker"):
            archive.writestr(name, pickled(root))
    return stream.getvalue()


def prepare_base(root: Path) -> None:
    """Dataset and cut-off run that every attack starts from a copy of."""
    make_dataset(root / "data")
    codes = forked.run([*_base(root), "--exit-interval", "2"], 1, root / "base.log")
    assert codes == [75], (root / "base.log.0").read_text()


def _base(root: Path, *more: str) -> list[str]:
    return [
        *TINY,
        "--train-iters",
        "4",
        "--data-path",
        str(root / "data"),
        "--run-dir",
        str(root / "run"),
        "--data-cache-path",
        str(root / "cache"),
        *more,
    ]


def _resume(root: Path) -> list[str]:
    return _base(root, "--resume")


def _fresh(*more: str) -> Callable[[Path], list[str]]:
    return lambda root: [*_base(root), "--run-dir", str(root / "new"), *more]


def _step(root: Path) -> Path:
    return root / "run" / "checkpoints" / "step-00000002"


def _write(path: str, content: Callable[[Path], bytes]) -> Callable[[Path], Any]:
    return lambda root: (root / path).write_bytes(content(root))


def _manifest(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], Any]:
    """A manifest that is in order, with its own digest, but for the change."""

    def plant(root: Path) -> None:
        rewrite(_step(root), lambda manifest: change(manifest, root))

    return plant


def _replace_tensors(content: Callable[[Path], bytes]) -> Callable[[Path], Any]:
    """Another file for the tensors, with size and header digest to match."""

    def change(manifest: dict[str, Any], root: Path) -> None:
        data = content(root)
        (_step(root) / "rank-00000.safetensors").write_bytes(data)
        length = int.from_bytes(data[:8], "little")
        header = data[: 8 + length] if length <= len(data) else data[:8]
        entry = manifest["files"]["rank-00000.safetensors"]
        entry.update(size=len(data), header_sha256=hashlib.sha256(header).hexdigest())

    return _manifest(change)


def _safetensors(header: dict[str, Any], data: bytes = b"\0" * 64) -> Callable[[Path], bytes]:
    body = json.dumps(header).encode()
    return lambda root: len(body).to_bytes(8, "little") + body + data


def _cache(content: Callable[[Path], bytes], name: str) -> Callable[[Path], Any]:
    """A cached sample index that is an array of objects, with a digest to match."""

    def plant(root: Path) -> None:
        for listing in (root / "cache").rglob("*-train.json"):
            digests = json.loads(listing.read_text())
            (path,) = listing.parent.glob(f"{listing.stem}-{name}.npy")
            path.write_bytes(content(root))
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            listing.write_text(json.dumps(digests))

    return plant


def _megatron_cache(root: Path) -> None:
    """What megatron-core itself would read, beside our files and in its default place."""
    for folder in {path.parent for path in (root / "cache").rglob("*.json")}:
        for path in list(folder.glob("*.npy")):
            megatron = path.name.replace("-train-", "-GPTDataset-train-")
            (folder / megatron).write_bytes(_object_array(root))


def _yaml(text: str) -> tuple[Callable[[Path], Any], Callable[[Path], list[str]]]:
    def plant(root: Path) -> None:
        (root / "evil.yaml").write_text(text.replace("CMD", f"touch {root / 'marker'}"))

    return plant, lambda root: [
        *_base(root),
        "--run-dir",
        str(root / "new"),
        "--config",
        str(root / "evil.yaml"),
    ]


def attacks() -> list[Attack]:
    """All of them."""
    refused, fresh = (66,), (0,)
    bad_header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    overlap = {n: {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} for n in "ab"}
    checkpoint = {
        "manifest-pickle": (_write(f"run/checkpoints/step-00000002/{MANIFEST}", pickled), refused),
        "tensors-pickle": (_replace_tensors(pickled), refused),
        "tensors-torch-save": (_replace_tensors(_torch_saved), refused),
        "tensors-zip": (_replace_tensors(_zip), refused),
        "header-2^62": (_replace_tensors(lambda _: (1 << 62).to_bytes(8, "little") * 9), refused),
        "header-sizes": (_replace_tensors(_safetensors(bad_header)), refused),
        "header-overlap": (_replace_tensors(_safetensors(overlap)), refused),
        "name-parent": (
            _manifest(
                lambda m, r: m["files"].update(
                    {"../../../marker": {"size": 0, "header_sha256": ""}}
                )
            ),
            refused,
        ),
        "name-absolute": (
            _manifest(
                lambda m, r: m["files"].update(
                    {str(r / "data.bin"): {"size": 0, "header_sha256": ""}}
                )
            ),
            refused,
        ),
        "huge-shape": (
            lambda root: rewrite_pieces(
                _step(root), lambda p: p[0]["shard"].update(global_shape=[1 << 30, 1 << 30])
            ),
            refused,
        ),
        "config-class": (
            _manifest(lambda m, r: m["config"]["model"].update(normalization="os.system")),
            (64,),
        ),
        "state-code": (
            _manifest(
                lambda m, r: m["state"].update(
                    flip_history="__import__('os').system('touch marker')"
                )
            ),
            (0, 66),
        ),
        "dcp-metadata": (_write("run/checkpoints/step-00000002/.metadata", pickled), fresh),
        "deepspeed-states": (
            _write("run/checkpoints/step-00000002/mp_rank_00_model_states.pt", _torch_saved),
            fresh,
        ),
        "rng-pickle": (_write("run/checkpoints/step-00000002/rng.pkl", pickled), fresh),
        "pointer-pickle": (_write("run/checkpoints/latest.json", pickled), fresh),
        "pointer-path": (
            _write(
                "run/checkpoints/latest.json", lambda r: b'{"step": 2, "folder": "../../../etc"}'
            ),
            fresh,
        ),
        "deepspeed-latest": (_write("run/checkpoints/latest", lambda r: b"../../evil"), fresh),
        "lock-pickle": (_write("run/checkpoints/.lock", pickled), fresh),
        "metrics-pickle": (_write("run/metrics.jsonl", pickled), fresh),
        "order-pickle": (_write("run/.attempt.json", pickled), fresh),
        "index-document": (_cache(_object_array, "document_index"), fresh),
        "index-sample": (_cache(_object_array, "sample_index"), fresh),
        "index-shuffle": (_cache(_object_array, "shuffle_index"), fresh),
        "index-pickle": (_cache(pickled, "document_index"), fresh),
        "index-eval": (_cache(lambda r: pickled(r, "eval"), "shuffle_index"), fresh),
        "megatron-index": (_megatron_cache, fresh),
    }
    found = [Attack(name, plant, _resume, codes) for name, (plant, codes) in checkpoint.items()]
    data = {
        "idx-pickle": (_write("data.idx", pickled), 65),
        "idx-npy": (_write("data.idx", _object_array), 65),
        "sidecar-pickle": (_write("data.json", lambda r: pickled(r, "exec")), 65),
        "sidecar-deep": (_write("data.json", lambda r: b"[" * 100_000), 65),
    }
    found += [Attack(name, plant, _fresh(), (code,)) for name, (plant, code) in data.items()]
    for name, content in (
        ("tok.model", pickled),
        ("tok-sub.model", lambda r: pickled(r, "subprocess")),
        ("tok.json", lambda r: b'{"auto_map": {"AutoTokenizer": "evil.Evil"}}'),
    ):
        found.append(
            Attack(
                name,
                _write(name, content),
                lambda root, name=name: [
                    *_base(root),
                    "--run-dir",
                    str(root / "new"),
                    "--tokenizer-model",
                    str(root / name),
                ],
                (65,),
            )
        )
    for number, text in enumerate(
        (
            "model: !!python/object/apply:os.system ['CMD']\n",
            "model: !!python/object/apply:subprocess.call [['sh', '-c', 'CMD']]\n",
            "model:\n  num_layers: !!python/object/apply:eval ['1']\n",
            "model: !!python/name:os.system\n",
            "model: !!python/module:os\n",
            "model: !!python/object/new:os.system ['CMD']\n",
            "model:\n  normalization: os.system\n",
            "data:\n  tokenizer_type: os.system\n",
        )
    ):
        found.append(Attack(f"yaml-{number}", *_yaml(text), (64,)))
    return found


def attempt(attack: Attack, base: Path, root: Path) -> list[str]:
    """Run one attack on a copy of the base; what went wrong."""
    shutil.copytree(base, root)
    attack.plant(root)
    log = root / "attack.log"
    ranks = [_CONTEXT.Process(target=_audited, args=(attack.flags(root), str(log)))]
    ranks[0].start()
    (code,) = forked.wait(ranks, 60.0)
    text = Path(log).read_text()
    wrong = [f"{attack.name}: {line}" for line in text.splitlines() if "FORBIDDEN" in line]
    if (root / "marker").exists() or Path("/tmp/marker").exists():
        wrong.append(f"{attack.name}: its code ran")
    if code not in attack.codes:
        wrong.append(f"{attack.name}: exit code {code}, expected {attack.codes}: {text[-400:]}")
    shutil.rmtree(root)
    return wrong


_CONTEXT = forkserver.context()


def _audited(flags: list[str], log: str) -> None:
    """A rank under an audit hook that writes down what must not happen."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        probe = event == "subprocess.Popen" and arguments[0] != sys.executable
        if event in FORBIDDEN or probe:
            os.write(descriptor, f"FORBIDDEN {event} {str(arguments)[:200]}\n".encode())

    forked.serve(flags, {"MASTER_PORT": "0"}, log, lambda: sys.addaudithook(watch))
