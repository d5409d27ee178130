"""Parameters, memory of a rank and step time of a run, before it is started; and what fits.

    python tools/estimate.py configs/models/llama_8b.yaml --config configs/recipes/fst.yaml ...
    python tools/estimate.py configs/models/llama_8b.yaml --gpus 64 --micro-batch-size 2 --search
    python tools/estimate.py configs/models/gpt2_124m.yaml --gpus 2 --measure    (on this machine)
    python tools/estimate.py --check tools/results/estimate-points-h200.json --output TABLE.md
    python tools/estimate.py configs/models/llama_8b.yaml --goodput 1024 4096 --zero-stage 1

Flags of launch/pretrain.py may follow, further configuration files among them. `--search` lists the
layouts that fit the GPUs' memory, the fastest first. `--measure` runs some steps of the layout on
this machine's GPUs with generated data and prints estimate and measurement side by side; `--check`
does so for runs measured before. `--goodput` simulates failures, saves and restarts of long runs
and advises a `--save-interval`. Bytes between two steps are exact; activations are counted
operator by operator; times come from measured rates (tools/results/gemm-h200.json), in BF16 and
FP8. The time to launch a kernel is that of one slow host: give yours (`--launch-us`). No GPU and no
data are needed, but for `--measure`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tools.bench, which --measure uses

from megasparse.atomic_files import write_text
from megasparse.cli import guarded
from megasparse.config import (
    ResolvedConfig,
    RunConfig,
    load_config,
    padded_vocab_size,
    resolve,
    smallest_world,
)
from megasparse.config.shapes import active_parameter_count, parameter_count
from megasparse.data.check import check_data
from megasparse.errors import ConfigError
from megasparse.estimate import check as measured_points
from megasparse.estimate.bubble import bubble_lines
from megasparse.estimate.memory import Footprint, footprint
from megasparse.estimate.phases import PhaseTime, describe, phase_times
from megasparse.estimate.time import GemmTable, StepTime, step_time
from megasparse.sparsity.run_recipe import recipe_of
from megasparse.train.precision import settle_fp8
from tools.bench import goodput_table
from tools.bench.parts.short_runs import launch

TABLE = ROOT / "tools" / "results" / "gemm-h200.json"

GIB = 2**30
USABLE = 0.94  # of a GPU's memory: the rest is the driver's, NCCL's, and fragments
WARMUP = 3
EVEN_STAGES: dict[str, Any] = {
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
}


@dataclass(frozen=True)
class Estimate:
    """One layout: every stage's bytes, and the time of a step (None: no rates for its dtype), which
    is one of the first sparse phase, and those of all phases."""

    config: ResolvedConfig
    world: int
    stages: list[Footprint]
    time: StepTime | None
    phases: list[PhaseTime] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes of the fullest stage."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def name(self) -> str:
        """The layout in words."""
        parallel = self.config.parallel
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        cp = parallel.context_parallel_size
        words = [f"tp {tp}", *([f"cp {cp}"] if cp > 1 else []), f"pp {pp}"]
        words += [f"dp {self.world // (tp * cp * pp)}"]
        if (ep := parallel.expert_model_parallel_size) > 1:
            words.append(f"ep {ep}")
        words += ["sp"] if parallel.sequence_parallel else []
        words += [f"zero {parallel.zero_stage}"]
        words += [f"recompute {g}"] if (g := parallel.recompute_granularity) else []
        return ", ".join(words)


def estimate(config: ResolvedConfig, world: int, table: GemmTable, args: Any) -> Estimate:
    """Of a configuration for `world` ranks."""
    config = settle_fp8(config, None if args.device == "cuda" else torch.device("cpu"))
    recipe, vocabulary = recipe_of(config), vocabulary_of(config)
    stages = [
        footprint(config, recipe, vocabulary, world, stage, gpu=args.device == "cuda")
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]
    time, phases = None, []
    if config.train.bf16 and args.device == "cuda":
        rest = (vocabulary, world, table, args.gpus_per_node)
        time, phases = step_time(config, recipe, *rest), phase_times(config, recipe, *rest)
    return Estimate(config, world, stages, time, phases)


def vocabulary_of(config: ResolvedConfig) -> int:
    """The padded vocabulary, from the configuration or its tokenizer."""
    size = config.model.vocab_size or check_data(config).vocab_size
    return padded_vocab_size(size, config)


def layouts(config: RunConfig, world: int, gpus_per_node: int) -> Iterator[ResolvedConfig]:
    """Every division of the run over `world` ranks that a configuration allows."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    experts = sizes if config.model.num_experts else [1]
    near, kinds = [n for n in sizes if n <= gpus_per_node], (None, "selective", "full")
    divided = itertools.product(near, sizes, sizes, kinds, (1, 2), experts)
    for tp, cp, pp, recompute, zero, ep in divided:
        if world % (tp * cp * pp):
            continue
        parallel = dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            sequence_parallel=tp > 1,
            zero_stage=zero,
            recompute_granularity=recompute,
            recompute_method=None,
            recompute_num_layers=None,
            **EVEN_STAGES,
        )
        try:
            yield resolve(dataclasses.replace(config, parallel=parallel), world)
        except ConfigError:
            continue  # sizes that do not divide


def report(found: Estimate, args: argparse.Namespace) -> str:
    """The text for one layout."""
    config = found.config
    recipe, vocabulary = recipe_of(config), vocabulary_of(config)
    whole = parameter_count(config.model, vocabulary)
    active = active_parameter_count(config.model, vocabulary)
    lines = [
        f"parameters        {whole:,} (vocabulary padded to {vocabulary:,})",
        *([f"  for a token     {active:,}"] if active < whole else []),
        f"layout            {found.name}; micro-batch {config.train.micro_batch_size}, global "
        f"batch {config.train.global_batch_size}, recipe {recipe.name}",
        "",
        "GiB of a rank     " + "".join(f"{f'stage {s.stage}':>10}" for s in found.stages),
    ]
    names = [*found.stages[0].state, *found.stages[0].transient]
    for name in names:
        values = [(s.state | s.transient)[name] / GIB for s in found.stages]
        lines.append(f"  {name:<16}" + "".join(f"{value:>10.2f}" for value in values))
    lines.append(f"  {'peak':<16}" + "".join(f"{s.peak_bytes / GIB:>10.2f}" for s in found.stages))
    numbers = "".join(f"{s.parameters / 1e6:>9.1f}M" for s in found.stages)
    sparse = "".join(f"{s.sparse_parameters / 1e6:>9.1f}M" for s in found.stages)
    lines += [f"  {'parameters':<16}{numbers}", f"  {'of them 2:4':<16}{sparse}"]
    limit = args.gpu_memory * USABLE
    fits = "fits" if found.peak / GIB <= limit else "DOES NOT FIT"
    lines.append(f"  {fits} {args.gpu_memory:g} GiB ({limit:.0f} usable)")
    lines += bubble_lines(config, found.world)
    if found.time is None:
        return "\n".join([*lines, "", "no step time: the rates are of BF16 and FP8 on a GPU"])
    seconds = found.time.seconds
    lines += ["", f"step time         {seconds:.3f} s, {_rate(found):,.0f} tokens/s"]
    for name, part in (found.time.parts | {"waiting for host": found.time.waiting}).items():
        lines.append(f"  {name:<20}{part:>8.3f} s{part / seconds:>7.0%}")
    lines += describe(found.phases, config.train.global_batch_size * config.model.seq_length)
    return "\n".join(lines)


def search(config: RunConfig, table: GemmTable, args: argparse.Namespace) -> tuple[str, int]:
    """The layouts that fit, and an exit code: 1 if none does."""
    found = [
        estimate(layout, args.gpus, table, args)
        for layout in layouts(config, args.gpus, args.gpus_per_node)
    ]
    fitting = [e for e in found if e.peak / GIB <= args.gpu_memory * USABLE]
    fitting.sort(key=lambda e: e.time.seconds if e.time else e.peak)
    lines = [f"{len(fitting)} of {len(found)} layouts fit {args.gpus} x {args.gpu_memory:g} GiB"]
    if found and not fitting:
        best = min(found, key=lambda e: e.peak)
        lines.append(f"the smallest takes {best.peak / GIB:.1f} GiB: {best.name}")
    for e in fitting[: args.top]:
        speed = f"{e.time.seconds:8.3f} s  {_rate(e):>12,.0f} tokens/s" if e.time else ""
        lines.append(f"  {e.peak / GIB:7.1f} GiB  {speed}  {e.name}")
    return "\n".join(lines), 0 if fitting else 1


def measure(found: Estimate, flags: Sequence[str], args: argparse.Namespace) -> str:
    """Estimate and measurement of the layout side by side (first rank)."""
    vocabulary = ["--vocab-size", str(found.config.model.vocab_size or vocabulary_of(found.config))]
    no_data = "--eval-iters 0 --tokenizer-model none --mock-data --data-path --train-data-path"
    no_data += " --valid-data-path --test-data-path"
    job = {"flags": [*flags, *vocabulary, *no_data.split()], "steps": WARMUP + args.steps}
    run = launch({"run": job}, found.world, args.device)["run"]
    seconds = statistics.median(run["seconds"][WARMUP:])
    whole = parameter_count(found.config.model, vocabulary_of(found.config))
    rows: list[tuple[str, float, Any]] = [("parameters of the model", whole, run["parameters"])]
    if args.device == "cuda":
        rows.append(("GiB, peak of rank 0", found.stages[0].peak_bytes / GIB, run["memory"]))
    if found.time is not None:
        rows.append(("seconds a step", found.time.seconds, seconds))
    lines = [f"{run['hardware']}, torch {run['torch']}, {found.name}"]
    lines.append(f"{'':<26}{'estimated':>16}{'measured':>16}{'ratio':>8}")
    for name, estimated, measured in rows:
        form = ",.0f" if isinstance(measured, int) else ".3f"
        ratio = estimated / measured
        lines.append(f"{name:<26}{estimated:>16{form}}{measured:>16{form}}{ratio:>8.2f}")
    return "\n".join(lines)


def goodput(
    config: RunConfig, table: GemmTable, args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """The table of `--goodput`, printed or written to a file.

    Raises:
        ConfigError: a size does not fit the run, or the table cannot be written.
    """
    sizes = args.goodput or [args.gpus]
    found = [estimate(resolve(config, gpus), gpus, table, args) for gpus in sizes]
    text = goodput_table.table(found, args)
    if args.output is None:
        print(text)
        return
    command = shlex.join(["python", "tools/estimate.py", *argv])
    whole = parameter_count(found[0].config.model, vocabulary_of(found[0].config))
    layout = f"{whole:,} parameters; {found[0].name.partition(', dp')[0]}, the rest data parallel"
    try:
        write_text(args.output, goodput_table.page(text, command, layout))
    except OSError as error:
        raise ConfigError(f"--output {args.output}: {error}") from None


def check(table: GemmTable, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """The table of `--check`, printed or written to a file.

    Raises:
        ConfigError: the file of points cannot be read, or the table's cannot be written.
    """
    content = measured_points.read_points(args.check)
    rows = measured_points.compare(content, table, lambda c, n: estimate(c, n, table, args), ROOT)
    command = shlex.join(["python", "tools/estimate.py", *argv])
    text = measured_points.report(content, rows, command)
    if args.output is None:
        print(text, end="")
        return
    try:
        write_text(args.output, text)
    except OSError as error:
        raise ConfigError(f"--output {args.output}: {error}") from None


def _rate(found: Estimate) -> float:
    assert found.time is not None
    tokens = found.config.train.global_batch_size * found.config.model.seq_length
    return tokens / found.time.seconds


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, nargs="?", help="YAML file")
    parser.add_argument("--gpus", type=int, help="ranks (default: the fewest of the layout)")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu-memory", type=float, help="GiB (default: the table's GPU)")
    parser.add_argument("--table", type=Path, default=TABLE, help="measured rates")
    parser.add_argument("--launch-us", type=float, help="host's time a kernel (the table's)")
    parser.add_argument("--search", action="store_true", help="list the layouts that fit")
    parser.add_argument("--top", type=int, default=12, help="layouts to list")
    parser.add_argument("--measure", action="store_true", help="run it here and compare")
    parser.add_argument("--check", type=Path, help="compare with the measured points of a file")
    parser.add_argument("--output", type=Path, help="markdown file of --check or --goodput")
    parser.add_argument("--steps", type=int, default=6, help="steps to measure")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    goodput_table.add_flags(parser)
    args, flags = parser.parse_known_args(argv)
    if (args.config is None) == (args.check is None):
        parser.error("expected a configuration, or --check FILE")
    if args.check and (flags or args.device == "cpu"):
        parser.error(f"--check takes its runs from the file, on GPUs; found {shlex.join(argv)}")
    return args, flags


def main(argv: Sequence[str]) -> int:
    args, flags = parse(argv)
    return guarded("estimate.py", lambda: run(args, flags, argv))


def run(args: argparse.Namespace, flags: list[str], argv: Sequence[str]) -> int:
    """What the flags ask for; the exit code."""
    table = GemmTable(args.table)
    if args.launch_us is not None:
        table.data["launch_us"] = args.launch_us
    args.gpu_memory = args.gpu_memory or table.data["memory_gib"]
    if args.check:
        check(table, args, argv)
        return 0
    flags = ["--config", str(args.config), *flags]
    loaded = load_config(flags)
    args.gpus = args.gpus or smallest_world(loaded)
    if args.goodput is not None:
        goodput(loaded, table, args, argv)
        return 0
    if args.search:
        text, code = search(loaded, table, args)
        print(text)
        return code
    found = estimate(resolve(loaded, args.gpus), args.gpus, table, args)
    print(report(found, args))
    if args.measure:
        print("\n" + measure(found, flags, args))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
