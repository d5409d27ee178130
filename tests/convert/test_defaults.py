"""What is on, and how much, where nobody says anything: a default that changes is noticed."""

from __future__ import annotations

from tests.defaults import check

# A switch that is not here is off.
WRITTEN: dict[str, dict[str, object]] = {
    "convert.export": {
        "_FORMAT": 1,
    },
    "convert.huggingface.architecture": {
        "_MAX_SEQ_LENGTH": 4096,
    },
    "convert.huggingface.config_keys": {
        "Must(written)": True,
    },
    "convert.huggingface.family": {
        "Family(first_position)": 0,
    },
    "convert.huggingface.folder": {
        "_MAX_JSON_BYTES": 2**28,
    },
    "convert.huggingface.layer_keys": {
        "NoRope(default)": 4,
    },
    "convert.huggingface.model_card": {
        "Facts(samples)": 0,
        "Facts(seq_length)": 0,
    },
    "convert.huggingface.rope_keys": {
        "Rope(theta)": 10000.0,
    },
    "convert.megatron.torch_dist_files": {
        "_MAX_METADATA_BYTES": 2**31,
    },
    "convert.source": {
        "_CHUNK": 2**22,
    },
}


def test_defaults_are_as_written():
    check("convert", WRITTEN)
