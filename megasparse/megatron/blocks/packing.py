"""Documents that do not see each other, for Transformer Engine: packed sequences.

The samples of a micro-batch are laid end to end, `(1, B * S)`, and attention is given the
cumulative lengths of the documents in them (Megatron's `PackedSeqParams`, the "thd" format). So
`--reset-attention-mask` needs no `(S, S)` masks, which Transformer Engine's causal attention does
not take. Elsewhere (CPUs, float32, pipelines, distillation, deterministic mode) masks are used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.packed_seq_params import PackedSeqParams

CU_SEQLENS = "cu_seqlens"


def cumulative_lengths(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Where the documents of samples that are laid end to end begin, and where the last one ends.

    A document ends with its end-of-document token, and at the end of a sample.

    Args:
        tokens: `(B, S)` int64.
        eod: the token that ends a document.

    Returns:
        int32 `(documents + 1,)`, from 0 to B * S.
    """
    ends = tokens == eod
    ends[:, -1] = True
    bounds = ends.flatten().nonzero().flatten() + 1
    return torch.cat([bounds.new_zeros(1), bounds]).to(torch.int32)


def bounds_by_positions(positions: torch.Tensor) -> torch.Tensor:
    """The same of documents whose positions begin with 0, whatever their tokens.

    Args:
        positions: `(B, S)` int64.

    Returns:
        int32 `(documents + 1,)`, from 0 to B * S.
    """
    begins = (positions == 0).flatten().nonzero().flatten()
    return torch.cat([begins, begins.new_tensor([positions.numel()])]).to(torch.int32)


def packed(
    batch: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], PackedSeqParams | None]:
    """A micro-batch as the model takes it, and the lengths of its documents if it is packed.

    Args:
        batch: of `data.batches.batches`; with `cu_seqlens` it is packed.

    Returns:
        The tensors, tokens, positions and labels as `(1, B * S)` of a packed one.
    """
    bounds = batch.get(CU_SEQLENS)
    if bounds is None:
        return dict(batch), None
    # Of no document: the longest that there can be. The true length would wait for the device.
    longest = batch["tokens"].shape[1]
    names = ("tokens", "position_ids", "labels", "loss_mask")
    flat = {name: batch[name].reshape(1, -1) for name in names if name in batch}
    lengths = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return {**batch, **flat}, lengths
