"""Ranks from what launchers, srun and mpirun say; what cannot be right is refused at once."""

from __future__ import annotations

import os
import re

import pytest

from megasparse.distributed.environment import rank_for_log, settle_environment
from megasparse.errors import ConfigError

TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "5000"}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


def _settle(monkeypatch, variables: dict[str, str]) -> tuple[int, int]:
    for name in list(os.environ):
        if re.match("RANK|LOCAL_RANK|WORLD_SIZE|MASTER_|SLURM_|OMPI_|PMI_|MPI_|MV2_", name):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in variables:  # what is filled in goes again after the test
            monkeypatch.setenv(name, "")
            del os.environ[name]
    return settle_environment()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"MASTER_ADDR": "0.0.0.0", "MASTER_PORT": "abc"}, (0, 1)),  # one rank meets nobody
        (TWO, (1, 2)),
        ({**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2)),
        ({**OMPI, "MASTER_ADDR": "127.0.0.1"}, (1, 2)),
        ({**OMPI, **TWO}, (1, 2)),
        ({**STEP, "SLURM_STEP_NUM_NODES": "1"}, (1, 2)),
        ({**STEP, "MASTER_ADDR": "127.0.0.1"}, (1, 2)),
        (
            {**STEP, "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "::1", "MASTER_PORT": "1"},
            (3, 4),
        ),
        ({"SLURM_NTASKS": "2", "RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"}, (0, 2)),
    ],
)
def test_the_right_ranks(monkeypatch, variables, expected):
    assert _settle(monkeypatch, variables) == expected
    assert (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, "RANK: found '1', expected a whole number from 0 to 0"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK: found '1'"),
        ({**TWO, "RANK": "2"}, r"from 0 to 1 \(WORLD_SIZE is 2\)"),
        ({**TWO, "RANK": "abc"}, "RANK: found 'abc'"),
        ({**TWO, "RANK": "-1"}, "RANK: found '-1'"),
        ({**TWO, "RANK": "٣"}, "RANK: found"),
        ({**TWO, "RANK": "9" * 5000}, "RANK: found"),
        ({**TWO, "WORLD_SIZE": "0"}, "WORLD_SIZE: found '0'"),
        ({**TWO, "WORLD_SIZE": ""}, "WORLD_SIZE: found ''"),
        ({**TWO, "WORLD_SIZE": "99999999"}, "WORLD_SIZE: found '99999999'"),
        ({**TWO, "LOCAL_RANK": "x"}, "LOCAL_RANK: found 'x'"),
        ({**TWO, "MASTER_PORT": "abc"}, "MASTER_PORT: found 'abc'"),
        ({**TWO, "MASTER_PORT": "70000"}, "MASTER_PORT: found '70000', .* from 1 to 65535"),
        ({**TWO, "MASTER_PORT": "0"}, "MASTER_PORT: found '0'"),
        ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR: found ''"),
        ({**TWO, "MASTER_ADDR": "0.0.0.0"}, "MASTER_ADDR: found '0.0.0.0'.*listen"),
        ({**TWO, "MASTER_ADDR": "::"}, "MASTER_ADDR: found '::'"),
        ({**TWO, "MASTER_ADDR": "no such host"}, "MASTER_ADDR: 'no such host' is no known host"),
        ({**TWO, "MASTER_ADDR": "x" * 300}, "is no known host"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_NTASKS is 2"),
        ({**STEP, "SLURM_STEP_NUM_NODES": "2"}, "srun started 2 processes on several hosts"),
        (OMPI, "Open MPI.* started 2 processes on several hosts; set MASTER_ADDR"),
        ({**OMPI, "RANK": "0", "WORLD_SIZE": "1"}, "RANK is '0' .* says rank 1 of 2"),
    ],
)
def test_what_cannot_be_right_is_refused(monkeypatch, variables, words):
    with pytest.raises(ConfigError, match=words) as refused:
        _settle(monkeypatch, variables)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    assert 0 <= rank_for_log() < 10**8
