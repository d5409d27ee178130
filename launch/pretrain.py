"""Pre-train a language model with 2:4 sparse linear layers.

    deepspeed launch/pretrain.py --config configs/quickstart.yaml [--flags]
    python -m torch.distributed.run --nproc-per-node 2 launch/pretrain.py --config ...

`--help` lists every flag and the exit codes.
"""

import os
import sys
from pathlib import Path

# Before torch: a lost peer is one line of ours, not a stack of its store's.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from megasparse import log
from megasparse.checkpoint.directory import list_steps
from megasparse.config import build_parser
from megasparse.distributed.signals import StopRequest
from megasparse.distributed.supervise import is_supervised, supervise
from megasparse.errors import MegasparseError
from megasparse.preflight.settings import Prepared, prepare


def run() -> int:
    """The exit code of this rank."""
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
    log.setup(rank)
    try:
        prepared = prepare(sys.argv[1:], world)
    except MegasparseError as error:
        tell(error)
        return error.exit_code
    if not is_supervised():
        for note in prepared.notes:
            log.logger.info("%s", note)
    if prepared.config.checkpoint.max_restarts and not is_supervised():
        settings = prepared.config.checkpoint
        return supervise(
            settings,
            [sys.executable, *sys.argv],
            rank,
            lambda: max(list_steps(Path(settings.save)), default=-1),
        )
    return train(prepared)


def tell(error: MegasparseError) -> None:
    """What is wrong: a line for each problem."""
    name, problems = type(error).__name__, error.problems or (str(error),)
    for number, problem in enumerate(problems, 1):
        which = f" {number} of {len(problems)}" if len(problems) > 1 else ""
        log.logger.error("%s%s: %s", name, which, " ".join(problem.split()))


def train(prepared: Prepared) -> int:
    """The training itself; its imports take seconds, so a mistake is told before."""
    from megasparse.megatron.import_without_compile import import_megatron

    import_megatron()
    from megasparse.train.main import main

    return main(prepared, stop)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        build_parser().print_help()
        sys.exit(0)
    stop = StopRequest().install()
    code = run()
    sys.stderr.flush()
    if code:
        # Other ranks may wait in a collective: leave without their goodbye.
        os._exit(code)
