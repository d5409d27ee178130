"""Long tests of what a run promises when things go wrong; each adds a row to a table of results.

    python -m tools.bench.soak save-kills --count 1000
    python -m tools.bench.soak corruption | soak-kills | sigterms | bad-inputs | malicious | resume
    python -m tools.bench.soak second-starts | signals | suspensions | hangs | renamed | fuzz
    python -m tools.bench.soak disk-full | all

The same checks run in small in tests/reliability. Exit code 0 only if nothing was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megasparse.atomic_files import replacing, write_text
from megasparse.checkpoint.manifest import MANIFEST, decode_manifest
from megasparse.config import load_config
from tests import forked
from tests.checkpoint import saves
from tests.checkpoint.saves import write_checkpoint
from tests.convert.models import save_model
from tests.reliability import bad_inputs, endings, fuzzed, malicious, runs, signalled
from tests.reliability import second_starts as starts
from tests.runs import make_dataset
from tools import convert_checkpoint

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tools" / "results" / "reliability.md"
HEADER = """# Reliability: what was tried, and what came of it

Each row is one command of `tools.bench.soak`; "passed" means that every expectation below held.

| date | command | result | figures | seconds | hardware |
|---|---|---|---|---|---|
"""
LAYOUTS = {
    "one rank": (1, []),
    "tp 2": (2, ["--tensor-model-parallel-size", "2"]),
    "dp 2": (2, []),
    "zero 1, bf16": (2, ["--bf16"]),
    "s_ste": (1, ["--sparsity-recipe", "s_ste", "--masked-decay", "none"]),
}


def save_kills(count: int, seed: int, root: Path) -> dict[str, Any]:
    """SIGKILL at random instants of saves; every second process saves in the background."""
    result = saves.save_kills(root / "saves", count, seed)
    return {**result, "passed": result["lost"] == 0}


def corruption(count: int, seed: int, root: Path) -> dict[str, Any]:
    """Bit flips, truncations, deletions and exchanged files; the checkpoint before is taken."""
    result = saves.corruption(root / "checkpoints", count, seed)
    return {**result, "passed": result["undetected"] == 0 and result["wrong_fallback"] == 0}


def soak_kills(count: int, seed: int, root: Path) -> dict[str, Any]:
    """SIGKILL of a rank at random instants of whole runs, one rank and two, until they are done."""
    return _soak(count, seed, root, runs.kill_any, {-9, 71, 0})


def sigterms(count: int, seed: int, root: Path) -> dict[str, Any]:
    """SIGTERM, SIGINT, SIGUSR1 to one rank or all at random instants of two-rank runs."""
    return _soak(count, seed, root, runs.terminate, {75, 0})


def _soak(count: int, seed: int, root: Path, strike: Any, expected: set[int]) -> dict[str, Any]:
    data = make_dataset(root / "data")
    more = [
        "--train-iters",
        "150",
        "--save-interval",
        "10",
        "--eval-iters",
        "2",
        "--eval-interval",
        "25",
    ]
    total: dict[str, Any] = {}
    wrong: list[str] = []
    for world, share in ((1, count // 2), (2, count - count // 2)):
        result = runs.soak(data, root / f"world-{world}", world, share, strike, seed, *more)
        wrong += result.pop("differences")
        codes = result.pop("codes")
        wrong += [f"exit code {code}" for code in codes if code not in expected]
        total[f"ranks {world}"] = {**result, "codes": codes}
    for line in wrong:
        print(line)
    total["differing"] = len(wrong)
    strikes = sum(total[f"ranks {world}"]["strikes"] for world in (1, 2))
    return {"strikes": strikes, **total, "passed": not wrong and strikes >= count}


def bad_input(count: int, seed: int, root: Path) -> dict[str, Any]:
    """Every bad configuration and input, by the real launcher script, on every rank."""
    cases = bad_inputs.build(root)
    wrong, longest = [], 0.0
    for case in cases:
        begin = time.monotonic()
        processes = [
            subprocess.Popen(
                [sys.executable, "launch/pretrain.py", *bad_inputs.good_flags(root), *case.flags],
                env=bad_inputs.environment_of(case, rank),
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for rank, process in enumerate(processes):
            _, text = process.communicate(timeout=120)
            lines = [line for line in text.splitlines() if "Error: " in line]
            good = (
                process.returncode == case.code
                and len(lines) == 1
                and case.words in lines[0]
                and "Traceback" not in text
            )
            if not good:
                wrong.append(f"{case.name}, rank {rank}: {process.returncode}: {text[-200:]}")
        longest = max(longest, time.monotonic() - begin)
    for line in wrong:
        print(line)
    seconds = round(longest, 2)
    counts = {"cases": len(cases), "ranks": 2, "wrong": len(wrong), "longest_seconds": seconds}
    return {**counts, "passed": not wrong and longest < 5.0}


def malicious_files(count: int, seed: int, root: Path) -> dict[str, Any]:
    """Files that would run code if they were unpickled or evaluated; under an audit hook."""
    base = root / "base"
    base.mkdir()
    malicious.prepare_base(base)
    attacks = malicious.attacks()
    wrong = [line for a in attacks for line in malicious.attempt(a, base, root / a.name)]
    for line in wrong:
        print(line)
    return {"files": len(attacks), "wrong": len(wrong), "passed": not wrong}


def resume(count: int, seed: int, root: Path) -> dict[str, Any]:
    """A run cut off after each of 20 steps and continued, in several layouts, bit for bit."""
    data = make_dataset(root / "data")
    more = ["--train-iters", "30", "--eval-iters", "1", "--eval-interval", "6"]
    points, wrong = 0, []
    for name, (world, layout) in LAYOUTS.items():
        place = root / name.replace(" ", "-").replace(",", "")
        place.mkdir()
        reference = runs.flags(data, place / "reference", *more, *layout)
        assert forked.run(reference, world, place / "reference.log") == [0] * world
        for step in range(1, 21):
            found = runs.resume_at(data, place, step, world, *more, *layout)
            wrong += [f"{name}, step {step}: {entry}" for entry in found]
            points += 1
    for line in wrong:
        print(line)
    counts = {"points": points, "layouts": list(LAYOUTS), "differing": len(wrong)}
    return {**counts, "passed": not wrong}


def disk_full(count: int, seed: int, root: Path) -> dict[str, Any]:
    """A run whose checkpoints are on a tmpfs that fills up; the checkpoint before is intact."""
    data = make_dataset(root / "data")
    mount = root / "small"
    mount.mkdir()
    fill = f"{sys.executable} -m tests.checkpoint.disk_full {data} {mount} {root}"
    script = f"mount -t tmpfs -o size=8m tmpfs {mount} && exec {fill}"
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    print(process.stdout, process.stderr[-2000:])
    return {"figures": process.stdout.strip(), "passed": process.returncode == 0}


def second_starts(count: int, seed: int, root: Path) -> dict[str, Any]:
    """Starts of all kinds in the folder of a run that goes on; all are refused with 74."""
    return _told(starts.second_starts(make_dataset(root / "data"), root, count, seed))


def signals(count: int, seed: int, root: Path, skip: int = 0, jobs: int = 1) -> dict[str, Any]:
    """Signals to a rank, the group, either launcher or a supervisor, from the first line on."""
    return _told(signalled.signals(make_dataset(root / "data"), root, count, seed, skip, jobs))


def _told(result: dict[str, Any]) -> dict[str, Any]:
    """Print what was wrong; the row counts it."""
    for line in result["wrong"]:
        print(line)
    return {**result, "wrong": len(result["wrong"]), "passed": not result["wrong"]}


def suspensions(count: int, seed: int, root: Path) -> dict[str, Any]:
    """All ranks stopped for 15 s and continued; all runs end with 0."""
    result = endings.suspensions(make_dataset(root / "data"), root, count, 15.0, seed)
    return {**result, "passed": set(result["codes"]) == {0}}


def hangs(count: int, seed: int, root: Path) -> dict[str, Any]:
    """A rank that hangs at each phase; found and named in runs of one rank and two."""
    result = endings.hangs(make_dataset(root / "data"), root, count, seed)
    return {**result, "passed": not result["unnamed"]}


def renamed(count: int, seed: int, root: Path) -> dict[str, Any]:
    """Checkpoints renamed, copied and swapped, also with another run's; none is lost."""
    result = endings.renamed(root, count, seed)
    return {**result, "passed": result["lost"] == result["set_aside"] == 0}


def fuzz(count: int, seed: int, root: Path) -> dict[str, Any]:
    """Configurations, manifests and folders of models to convert, damaged by hypothesis."""
    path = root / "fuzzed.yaml"
    manifest = (write_checkpoint(root / "checkpoints", 1) / MANIFEST).read_bytes()
    configs = [path.read_bytes() for path in sorted((ROOT / "configs").rglob("*.yaml"))]

    def configuration(content: bytes) -> None:
        with replacing(path) as stream:
            stream.write(content)
        load_config(["--config", str(path)])

    def decode(content: bytes) -> None:
        decode_manifest(content, Path("manifest.json"))

    share, place = -(-count // 3), root / "converted"
    place.mkdir()
    total = {
        "configuration": fuzzed.fuzz("configuration", configuration, configs, share, seed, "yaml"),
        "manifest": fuzzed.fuzz("manifest", decode, [manifest], share, seed),
        "conversion": fuzzed.fuzz_folders(model_folders(root / "models"), place, share, seed),
    }
    for found in total.values():
        for line in found["wrong"]:
            print(line)
        found["wrong"] = len(found["wrong"])
    slow = max(found["slowest"] for found in total.values())
    return {**total, "passed": slow < 10.0 and not any(f["wrong"] for f in total.values())}


def model_folders(root: Path) -> dict[str, Path]:
    """Good inputs of conversions: two of Hugging Face, and one of our own."""
    for kind in ("llama", "gpt2"):
        save_model(root / kind, kind, shard="8KB" if kind == "llama" else "1GB")
    flags = ["--from", "huggingface", "--to", "megasparse", "--input", str(root / "gpt2")]
    assert convert_checkpoint.main([*flags, "--output", str(root / "ours")]) == 0
    return {
        "huggingface 1": root / "llama",
        "huggingface 2": root / "gpt2",
        "megasparse 1": root / "ours",
    }


COMMANDS: dict[str, tuple[Callable[..., dict[str, Any]], int]] = {
    "save-kills": (save_kills, 1000),
    "corruption": (corruption, 1500),
    "fuzz": (fuzz, 500),
    "hangs": (hangs, 30),
    "renamed": (renamed, 100),
    "second-starts": (second_starts, 200),
    "signals": (signals, 200),
    "suspensions": (suspensions, 50),
    "bad-inputs": (bad_input, 1),
    "disk-full": (disk_full, 1),
    "malicious": (malicious_files, 1),
    "resume": (resume, 20),
    "sigterms": (sigterms, 100),
    "soak-kills": (soak_kills, 200),
}


def hardware() -> str:
    """Processors of this machine."""
    return f"{os.cpu_count()}-core CPU machine, {platform.machine()}"


def record(command: str, result: dict[str, Any], seconds: float) -> None:
    """Add a row to the table."""
    TABLE.parent.mkdir(exist_ok=True)
    if not TABLE.exists():
        write_text(TABLE, HEADER)
    outcome = "passed" if result.pop("passed") else "FAILED"
    figures = "; ".join(f"{name} {value}" for name, value in result.items())
    today = datetime.date.today().isoformat()
    with open(TABLE, "a", encoding="utf-8") as stream:
        stream.write(
            f"| {today} | `{command}` | {outcome} | {figures} | {seconds:.0f} | {hardware()} |\n"
        )
    print(f"{command}: {outcome}: {figures} ({seconds:.0f} s)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=[*COMMANDS, "all"])
    parser.add_argument("--count", type=int, help="trials; default: what the table promises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skip", type=int, default=0, help="signals: the first trials, which were made before"
    )
    parser.add_argument("--jobs", type=int, default=1, help="signals: trials at once")
    arguments = parser.parse_args()
    chosen = list(COMMANDS) if arguments.command == "all" else [arguments.command]
    failed = False
    for name in chosen:
        function, default = COMMANDS[name]
        count = arguments.count or default
        begin = time.monotonic()
        with (
            tempfile.TemporaryDirectory(prefix="soak-") as folder,
            open(os.devnull, "w") as null,
            contextlib.redirect_stderr(null),
        ):
            more = {"skip": arguments.skip, "jobs": arguments.jobs} if name == "signals" else {}
            result = function(count, arguments.seed, Path(folder), **more)
        failed |= not result["passed"]
        extra = f" --count {count}" if default > 1 and name != "resume" else ""
        extra += f" --seed {arguments.seed}" if arguments.seed else ""
        for flag, value in more.items():
            extra += f" --{flag} {value}" if value != parser.get_default(flag) else ""
        record(f"python -m tools.bench.soak {name}{extra}", result, time.monotonic() - begin)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
