"""launch/slurm/node.sh: the exit code of a node's ranks, also of those that end together."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """#!/bin/sh
sleep "0.$RANK"
echo "$CODES" | cut -d ' ' -f $((RANK + 1)) > "$LOGS/code-$RANK"
exit "$(cat "$LOGS/code-$RANK")"
"""
# As bash does now and then where two children end together: one end is not told.
MISSING = """
wait() {
    if [ "$1" = -n ] && [ -z "${missed-}" ]; then missed=1; builtin wait -n; fi
    builtin wait "$@"
}
"""


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    ("codes", "expected"), [("0 0", 0), ("75 75", 75), ("5 0", 5), ("0 5", 5), ("127 127", 127)]
)
def test_the_exit_code_is_that_of_the_ranks(tmp_path, codes, expected, missing):
    (tmp_path / "rank").write_text(RANK)
    (tmp_path / "rank").chmod(0o755)
    (tmp_path / "missing").write_text(MISSING)
    # The pause before a failing node's report is for other nodes' ranks.
    (tmp_path / "sleep").write_text('#!/bin/sh\ncase $1 in 0.*) exec /bin/sleep "$1" ;; esac\n')
    (tmp_path / "sleep").chmod(0o755)
    done = subprocess.run(
        ["bash", "launch/slurm/node.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "SLURM_NNODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_CPUS_PER_TASK": "8",
            "RANKS_PER_NODE": "2",
            "LOGS": str(tmp_path),
            "PYTHON": str(tmp_path / "rank"),
            "CODES": codes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
            **({"BASH_ENV": str(tmp_path / "missing")} if missing else {}),
        },
    )
    assert done.returncode == expected, done.stdout + done.stderr
    assert ("had exit code" in done.stdout) == (expected != 0)
