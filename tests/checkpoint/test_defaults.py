"""What is on, and how much, where nobody says anything: a default that changes is noticed."""

from __future__ import annotations

from tests.defaults import check

# A switch that is not here is off.
WRITTEN: dict[str, dict[str, object]] = {
    "checkpoint.identity": {
        "_RUN_DIGITS": 16,
    },
    "checkpoint.lock": {
        "NOTE_SECONDS": 1.0,
    },
    "checkpoint.lock_owner": {
        "Owner(ahead)": 0.0,
        "REFRESH_SECONDS": 2.0,
        "STALE_SECONDS": 120.0,
    },
    "checkpoint.manifest": {
        "FORMAT": 3,
        "MAX_MANIFEST_BYTES": 2**30,
        "OLD_FORMAT": 2,
    },
    "checkpoint.model": {
        "StoredModel(effective)": True,
        "StoredModel(fold)": True,
    },
    "checkpoint.proof": {
        "check_sparsity(of)": 1,
        "check_sparsity(part)": 0,
    },
    "checkpoint.reader": {
        "CheckpointReader(verify)": True,
        "_OPEN_FILES": 16,
    },
    "checkpoint.saver": {
        "Saver(keep_last)": 2,
        "Saver(max_failed_saves)": 0,
    },
}


def test_defaults_are_as_written():
    check("checkpoint", WRITTEN)
