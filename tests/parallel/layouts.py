"""The matrix of layouts, as data."""

from __future__ import annotations

from tests.runs import LLAMA, TINY

TP2 = ["--tensor-model-parallel-size", "2"]
TP4 = ["--tensor-model-parallel-size", "4"]
PP2 = ["--pipeline-model-parallel-size", "2"]
PP4 = ["--pipeline-model-parallel-size", "4"]
CP2 = ["--context-parallel-size", "2"]
CP4 = ["--context-parallel-size", "4"]
SP = ["--sequence-parallel"]
FULL = ["--recompute-granularity", "full"]
SELECTIVE = ["--recompute-granularity", "selective"]


def zero(stage: int) -> list[str]:
    return ["--zero-stage", str(stage)]


# With tensor parallelism on four ranks a step has two micro-batches instead of four: each of its
# many collectives takes milliseconds where four ranks share two cores.
WIDE = ["--micro-batch-size", "4"]
# Without a pipeline a third and a fourth layer are more of the same.
SHALLOW = ["--num-layers", "2"]

# name: (ranks, flags). The global batch is 8 of micro-batches of 2: one to four a rank and step.
LAYOUTS = {
    "recompute full": (1, FULL),
    "recompute selective": (1, SELECTIVE),
    "zero 1": (1, zero(1)),
    "tp 2": (2, [*TP2, *SHALLOW]),
    "tp 2, sp, selective": (2, [*TP2, *SP, *SELECTIVE, *SHALLOW]),
    "pp 2": (2, PP2),
    "pp 2, uneven, zero 1": (2, [*PP2, "--decoder-first-pipeline-num-layers", "1", *zero(1)]),
    "pp 2, recompute block": (
        2, [*PP2, *FULL, "--recompute-method", "block", "--recompute-num-layers", "1"],
    ),
    "dp 2": (2, []),
    "dp 2, zero 1": (2, zero(1)),
    "dp 2, zero 2, full": (2, [*zero(2), *FULL, "--recompute-num-layers", "2"]),
    "dp 2, zero 3": (2, [*zero(3), *SHALLOW]),
    "tp 4": (4, [*TP4, *WIDE, *SHALLOW]),
    "tp 4, sp, full": (4, [*TP4, *SP, *FULL, *WIDE, *SHALLOW]),
    "pp 4, zero 1": (4, [*PP4, *zero(1)]),
    "dp 4, zero 2": (4, [*zero(2), *SHALLOW]),
    "cp 2": (2, [*CP2, *SHALLOW]),
    "cp 4, zero 1": (4, [*CP4, *zero(1), *SHALLOW]),
    "cp 2, dp 2, zero 2": (4, [*CP2, *zero(2), *SHALLOW]),
    "tp 2, sp, cp 2, full": (4, [*TP2, *SP, *CP2, *FULL, *SHALLOW]),
    "cp 2, pp 2, zero 1": (4, [*CP2, *PP2, *zero(1)]),
    "tp 2, pp 2": (4, [*TP2, *PP2, *WIDE, *SHALLOW]),
    "tp 2, sp, pp 2, zero 1, full": (4, [*TP2, *SP, *PP2, *zero(1), *FULL, *WIDE]),
    "tp 2, dp 2, zero 2": (4, [*TP2, *zero(2), *SHALLOW]),
    "tp 2, sp, dp 2": (4, [*TP2, *SP, *SHALLOW]),
    "tp 2, sp, dp 2, zero 3, full": (4, [*TP2, *SP, *zero(3), *FULL, *SHALLOW]),
    "pp 2, dp 2": (4, PP2),
    "pp 2, dp 2, zero 1, selective": (4, [*PP2, *zero(1), *SELECTIVE]),
}  # fmt: skip

STEPS = 6
# 130 tokens are padded to 144: no multiple of the vocabulary's is shared by the ranks evenly.
BASE = [
    *TINY, "--num-layers", "4", "--hidden-size", "32", "--vocab-size", "130",
    "--global-batch-size", "8", "--seq-length", "16",
    # Small steps: a 2:4 choice or an MVUE draw that falls the other way by rounding moves the loss
    # little, a wrong gradient still moves it by far more than the tolerance.
    "--lr", "2e-4", "--eval-iters", "1", "--eval-interval", "3",
    # Masks change before steps 0, 2 and 4; the learning rate falls over more steps than are made.
    "--mask-update-interval", "2", "--train-iters", str(STEPS), "--lr-decay-iters", "20",
]  # fmt: skip


def shape(flags: list[str]) -> list[str]:
    """Those of a layout's flags that its single process has too."""
    return [*(WIDE if WIDE[0] in flags else []), *(SHALLOW if SHALLOW[0] in flags else [])]


# The last token of the vocabulary ends a document: with 128 it is in the data (129 is not).
SMALL_VOCABULARY = ["--vocab-size", "128", "--make-vocab-size-divisible-by", "144"]
DOCUMENTS_APART = [
    *SMALL_VOCABULARY, "--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss",
]  # fmt: skip
GPT = ["--ffn-hidden-size", "64"]
LLAMA_STYLE = [*LLAMA, "--num-query-groups", "4", "--ffn-hidden-size", "64"]
S_STE = [
    "--sparsity-recipe", "s_ste", "--mask-update-interval", "2", "--masked-decay", "none",
    # With the default seed one layout (tp 2, sp, dp 2) draws two MVUE groups the other way: sums in
    # another order differ by 1e-7, and a probability on the edge falls to the other side. Two of
    # 128 rows of one weight then differ by 6e-5, and at step 13 one near-tie of its mask; all other
    # rows are equal to rounding.
    "--seed", "7",
]  # fmt: skip

# name: (flags, layouts). The first goes through all layouts, the second through those of up to two
# ranks and the richest of four, the others through the richest: four ranks on two cores are slow.
RICH = ["tp 2, sp, pp 2, zero 1, full", "dp 4, zero 2", "tp 2, sp, cp 2, full"]
RUNS = {
    "gpt fst": ([*BASE, *GPT], list(LAYOUTS)),
    "llama s_ste": (
        [*BASE, *LLAMA_STYLE, *S_STE],
        [*(name for name, (ranks, _) in LAYOUTS.items() if ranks <= 2), *RICH],
    ),
    "llama fst, attention too": (
        [
            *BASE, *LLAMA_STYLE, *DOCUMENTS_APART,
            # Masks of another kind from step 5 on, with grad_input pruned twice.
            "--sparsity-phases", "fst:1/2,row+grad-input=double-pruned:1/2",
            "--sparse-layers", "*.mlp.*", "*.self_attention.linear_*",
        ],
        [*RICH[:1], "cp 2, pp 2, zero 1"],
    ),
    "gpt s_ste_3, one layer": (
        [
            *BASE, *GPT, *S_STE, "--sparsity-recipe", "s_ste_3",
            "--sparse-layers", "decoder.layers.1.mlp.*",
            "--mvue-groups", "auto",  # strided: a micro-batch has two sequences
        ],
        RICH[:1],
    ),
}  # fmt: skip
