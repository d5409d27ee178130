"""Are the hosts of a run fit for it? Asked before anything is built, and by itself:

    python -m megasparse.preflight CONFIG [FLAGS]

under the launcher that starts the run (`deepspeed --hostfile hosts --module
megasparse.preflight CONFIG`, `srun`, `torchrun -m ...`), or alone for this host. FLAGS are the
run's, further `--config FILE` among them. A run does
the fast part at its start (`--preflight off|fast|full`). Exit code 77 when something would end or
spoil the run; each failure names the host and what to do.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence

from megasparse import log
from megasparse.config import load_config, resolve, smallest_world
from megasparse.data.check import check_data
from megasparse.distributed.control_plane import make_control_plane
from megasparse.distributed.environment import rank_for_log, settle_environment
from megasparse.distributed.rendezvous import join_group, leave_group, own_device
from megasparse.errors import MegasparseError
from megasparse.log import logger
from megasparse.preflight.check import check_hosts, require_fit


def main(argv: Sequence[str]) -> int:
    """The command; its exit code."""
    arguments = [a for a in argv if not a.startswith(("--local_rank", "--local-rank"))]
    log.setup(rank_for_log())
    if not arguments or arguments[0] in ("-h", "--help"):
        logger.info("%s", __doc__)
        return 0 if arguments else 64
    try:
        loaded = load_config(["--config", *arguments])
        parallel = loaded.parallel
        alone = smallest_world(loaded)
        world = settle_environment()[1] if "WORLD_SIZE" in os.environ else alone
        config = resolve(loaded, world)
        data, error = None, None
        try:
            data = check_data(config, every_byte=True)
        except MegasparseError as problem:
            error = problem
        timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
        join_group(own_device(), timeout)
        control = make_control_plane()
        if control.world < world:
            logger.info("preflight: this host alone; start it like the run to check all")
        findings = check_hosts(config, data, control, full=True, error=error)
        control.barrier()
        require_fit(findings)
        leave_group()
    except MegasparseError as problem:
        logger.error("%s: %s", type(problem).__name__, problem)
        return problem.exit_code
    logger.info("preflight: %d ranks are fit for the run", control.world)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
