"""Layouts that cannot be: refused by arithmetic alone, with both numbers, on every rank."""

from __future__ import annotations

import pytest

from megasparse.config import load_config, padded_vocab_size, pipeline_split, resolve
from megasparse.errors import ConfigError
from tests.parallel.layouts import CP2, FULL, PP2, SP, TP2, TP4, zero

BASE = ["--mock-data", "--vocab-size", "100", "--num-layers", "6", "--seq-length", "30"]

CASES = {
    # name: (ranks, flags, expected in the message)
    "world": (3, TP2, ["world size 3", "tensor_model_parallel_size 2"]),
    "world, tp x pp": (2, [*TP2, *PP2], ["world size 2", "pipeline_model_parallel_size 2"]),
    "world, tp x cp": (2, [*TP2, *CP2], ["world size 2", "context_parallel_size 2"]),
    "chunks": (2, CP2, ["seq_length 30", "2 x context_parallel_size 2"]),
    "chunks under sp": (
        4, [*TP2, *SP, *CP2], ["seq_length 30", "2 x tensor_model_parallel_size 2"],
    ),
    "chunks that cut groups of tokens": (
        2, [*CP2, "--seq-length", "36", "--micro-batch-size", "2"],
        ["seq_length 36", "micro_batch_size 2", "18 tokens", "multiple of 4"],
    ),
    "windows from rank to rank": (
        2, [*CP2, "--seq-length", "32", "--bf16", "--window-size", "5,0"],
        ["window_size 5,0", "p2p", "expected all_gather"],
    ),
    "strided groups": (
        2, [*CP2, "--seq-length", "32", "--mvue-groups", "auto"],
        ["mvue_groups auto", "neighbours"],
    ),
    "exchange of attention": (2, [*CP2, "--cp-comm-type", "a2a"], ["a2a", "p2p", "all_gather"]),
    "layers": (4, ["--pipeline-model-parallel-size", "4"], ["num_layers 6", "size 4"]),
    "layers of the first stage": (
        2, [*PP2, "--decoder-first-pipeline-num-layers", "6"], ["num_layers 6", "6 of them"],
    ),
    "layers of both ends": (
        2,
        [*PP2, "--decoder-first-pipeline-num-layers", "2",
         "--decoder-last-pipeline-num-layers", "3"],
        ["num_layers 6", "2 of them on stage 0", "3 of them on stage 1"],
    ),
    "ends without pipeline": (1, ["--decoder-last-pipeline-num-layers", "3"], ["above 1"]),
    "heads": (4, [*TP4, "--num-attention-heads", "6", "--hidden-size", "96"],
              ["num_attention_heads 6", "tensor_model_parallel_size 4"]),
    "kv groups": (4, [*TP4, "--group-query-attention", "--num-query-groups", "2"],
                  ["num_query_groups 2", "tensor_model_parallel_size 4"]),
    "4x4 block of the ffn": (4, [*TP4, "--ffn-hidden-size", "136"],
                             ["ffn_hidden_size 136", "tensor_model_parallel_size 4", "4x4 block"]),
    "4x4 block of a head": (2, [*TP2, "--kv-channels", "6"], ["kv_channels 6", "4x4 block"]),
    "sequence length": (4, [*TP4, *SP], ["seq_length 30", "tensor_model_parallel_size 4"]),
    "zero 2 with pipeline": (2, [*PP2, *zero(2)], ["zero_stage 2", "size 2"]),
    "zero 3 with pipeline": (2, [*PP2, *zero(3)], ["zero_stage 3", "size 2"]),
    "recompute chunk": (1, [*FULL, "--recompute-num-layers", "7"], ["recompute_num_layers 7", "6"]),
    "recompute chunk in a pipeline": (
        2, [*PP2, *FULL, "--recompute-num-layers", "2"], ["recompute_num_layers 2", "expected 1"],
    ),
    "method alone": (1, ["--recompute-method", "block"], ["recompute_granularity full"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    world, flags, expected = CASES[case]
    with pytest.raises(ConfigError) as caught:
        resolve(load_config([*BASE, *flags]), world)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize(
    ("flags", "split"),
    [
        (["--pipeline-model-parallel-size", "3"], [2, 2, 2]),
        ([*PP2, "--decoder-first-pipeline-num-layers", "1"], [1, 5]),
        ([*PP2, "--decoder-last-pipeline-num-layers", "2"], [4, 2]),
        (
            ["--pipeline-model-parallel-size", "4", "--decoder-first-pipeline-num-layers", "1",
             "--decoder-last-pipeline-num-layers", "3"],
            [1, 1, 1, 3],
        ),
        ([], [6]),
    ],
)  # fmt: skip
def test_layers_of_the_stages(flags, split):
    world = len(split)
    assert pipeline_split(resolve(load_config([*BASE, *flags]), world)) == split


def test_padding_of_the_vocabulary_does_not_depend_on_tensor_parallelism():
    sizes = {
        padded_vocab_size(130, resolve(load_config([*BASE, "--seq-length", "32", *flags]), world))
        for world, flags in ((1, []), (2, TP2), (4, TP4), (2, PP2))
    }
    assert sizes == {256}
