"""What saves and restarts of a run cost, from the bytes of its checkpoint and measured rates.

Of the control side (meeting, agreement, publication) rank 0's processor time counts: it grows with
the ranks, and all others wait for it. Its law `a N^p` comes from a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.estimate.goodput import Costs, mtbf_of

GB = 1e9
FLOAT32 = 4


@dataclass(frozen=True)
class Rates:
    """Of the machines; GB/s and seconds.

    Attributes:
        storage: all that the file system takes, from all hosts together.
        host: that one host reaches it with.
        copy: from a GPU to its host.
        sha256: of one core.
        start: processes, imports, model and first step.
        setup: a and p of the meeting, the control plane and the verification.
        publish: a and p of publishing a checkpoint.
    """

    storage: float
    host: float
    copy: float
    sha256: float
    start: float
    setup: tuple[float, float]
    publish: tuple[float, float]


def checkpoint_bytes(parameters: int, sparse: int, bf16: bool, zero: int) -> float:
    """Of a whole checkpoint: parameters, float32 masters with ZeRO, two moments, masks.

    Args:
        parameters, sparse: of the whole model.
    """
    weight = 2 if bf16 else FLOAT32
    state = (3 if zero else 2) * FLOAT32
    return parameters * (weight + state) + sparse / 16


def costs_of(
    size: float,
    gpus: int,
    gpus_per_node: int,
    rates: Rates,
    async_save: bool,
    failures_a_day_per_1000: float,
    notice: float = 12.0,
    repair: float = 0.0,
) -> Costs:
    """The costs of a run.

    Args:
        size: bytes of a checkpoint.
        notice: seconds from a failure until all ranks have ended.
    """
    hosts = max(1, gpus // gpus_per_node)
    through = size / GB / min(rates.storage, hosts * rates.host)
    hashed = size / gpus / GB / rates.sha256
    publish = rates.publish[0] * gpus ** rates.publish[1]
    # Written and hashed, then read back and hashed again.
    written = 2 * (through + hashed) + publish
    setup = rates.setup[0] * gpus ** rates.setup[1]
    return Costs(
        mtbf=mtbf_of(gpus, failures_a_day_per_1000),
        save=size / gpus / GB / rates.copy if async_save else written,
        publish=written if async_save else 0.0,
        restart=rates.start + setup + through + hashed,
        notice=notice,
        repair=repair,
    )
