"""What becomes of a run's FP8 on a device: as given, refused with the reason, or left out."""

from __future__ import annotations

import logging

import pytest
import torch

from megasparse import log
from megasparse.config import load_config, resolve
from megasparse.errors import ConfigError
from megasparse.fp8 import transformer_engine
from megasparse.train.precision import settle_fp8

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WIDE = [
    "--hidden-size", "128", "--ffn-hidden-size", "256", "--vocab-size", "128", "--mock-data",
    "--sparsity-recipe", "s_ste",
]  # fmt: skip


@pytest.fixture
def settled(monkeypatch, caplog):
    """The format that a run ends up with, and what it was told."""
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(log.logger, "propagate", True)

    def settle(device, *flags, hardware=None):
        monkeypatch.setattr(transformer_engine, "refusal", lambda _: hardware)
        config = resolve(load_config([*WIDE, *flags]), 1)
        with caplog.at_level(logging.INFO, logger=log.logger.name):
            found = settle_fp8(config, device)
        return found.fp8.fp8_format, " ".join(caplog.messages)

    return settle


def test_what_can_be_had_stays(settled):
    assert settled(GPU, "--bf16", "--fp8-format", "hybrid", "--fp8-fallback") == ("hybrid", "")
    assert settled(GPU, "--bf16") == (None, "")


@pytest.mark.parametrize(
    ("flags", "hardware", "reason"),
    [
        (["--bf16"], "A100 has no FP8 tensor cores", "A100 has no FP8 tensor cores"),
        (["--bf16", "--hidden-size", "192"], None, "x 192"),
        (["--bf16", "--num-attention-heads", "2", "--kv-channels", "20"], None, "of a dense"),
        (
            [
                "--bf16",
                "--num-experts",
                "2",
                "--moe-ffn-hidden-size",
                "192",
                "--disable-bias-linear",
            ],
            None,
            "mlp.experts.linear_fc1: FP8 of a 2:4 linear with a shard of 192 x 128",
        ),
        ([], None, "float32"),
    ],
)
def test_a_run_that_may_fall_back_says_why(settled, flags, hardware, reason):
    wanted = ["--fp8-format", "e4m3"]
    found, said = settled(GPU, *flags, *wanted, "--fp8-fallback", hardware=hardware)
    assert found is None and "the linears stay in" in said
    assert reason in said
    with pytest.raises(ConfigError, match="e4m3"):
        settled(GPU, *flags, *wanted, hardware=hardware)


def test_on_a_cpu_it_is_computed_by_definition_or_left_out(settled):
    here = {"hardware": "the run is on cpu, expected a GPU"}
    flags = ["--bf16", "--fp8-format", "e4m3"]
    found, said = settled(CPU, *flags, **here)
    assert found == "e4m3" and "by its definition" in said
    found, said = settled(CPU, *flags, "--fp8-fallback", **here)
    assert found is None and "the run is on cpu" in said
