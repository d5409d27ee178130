"""What BERT minimises, and what is told of it beside the loss.

    L = cross entropy of masked tokens + cross entropy of the segments' order      pre-training
    L = cross entropy of the class                                                 fine-tuning

as Megatron's `pretrain_bert.py` has it: means over the tokens, and samples, that count in a
micro-batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megasparse.megatron.bert import Bert
from megasparse.megatron.data.classes import LABEL
from megasparse.megatron.data.masked import IS_RANDOM, PADDING_MASK, TYPES, UNKNOWN_ORDER
from megasparse.megatron.grid import Grid
from megasparse.megatron.loss import masked_mean
from megasparse.train.engine.step_guard import Batch


class BertLoss(torch.nn.Module):
    """BERT with its loss.

    A batch is what a `MaskedStream` yields, or a stream of texts with classes.

    Args:
        model: `Bert` or `BertClassifier`.
        grid: this rank's place.
    """

    def __init__(self, model: Bert, grid: Grid) -> None:
        super().__init__()
        self.model = model
        self._has_types = model.embedding.tokentype_embeddings is not None
        self._grid = grid
        self._parts: dict[str, torch.Tensor] = {}
        self._batches = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        """0-d float32 loss of a micro-batch."""
        types = batch[TYPES] if self._has_types else None
        taken = batch["tokens"], batch[PADDING_MASK], types
        if LABEL in batch:
            return self._of_classes(self.model(*taken), batch[LABEL])
        losses, order = self.model(*taken, lm_labels=batch["labels"])
        loss = masked_mean(losses, batch["loss_mask"])
        parts = {"lm_loss": loss}
        if order is not None:
            parts["sop_loss"] = _mean_cross_entropy(order, batch[IS_RANDOM])
            loss = loss + parts["sop_loss"]
        self._note(parts)
        return loss

    def _of_classes(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(logits.float(), label)
        self._note({"accuracy": (logits.argmax(-1) == label).float().mean()})
        return loss

    def _note(self, parts: dict[str, torch.Tensor]) -> None:
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach().float()
        self._batches += 1

    def take_parts(self) -> dict[str, float]:
        """Means over the micro-batches since the last call, of all ranks; a collective call."""
        parts, batches = self._parts, self._batches
        self._parts, self._batches = {}, 0
        if not parts:
            return {}
        sums = torch.stack(list(parts.values()))
        if self._grid.world > 1:  # tensor-parallel ranks have the same
            dist.all_reduce(sums)
        means = (sums / (batches * self._grid.world)).tolist()
        return dict(zip(parts, means, strict=True))


def _mean_cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """0-d float32, over the samples whose label is known; 0 if none is."""
    known = (label != UNKNOWN_ORDER).float()
    losses = torch.nn.functional.cross_entropy(
        logits.float(), label, ignore_index=UNKNOWN_ORDER, reduction="none"
    )
    return masked_mean(losses, known)
