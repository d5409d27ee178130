"""What the training loop itself remembers, as JSON in the manifest of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megasparse.checkpoint.reader import CheckpointReader
from megasparse.config import ResolvedConfig
from megasparse.errors import CheckpointError


@dataclass
class LoopState:
    """Beside the clock.

    Attributes:
        flip_history: (step, mean flip rate over the sparse layers) at every mask refresh.
        refreshes: masks computed by then.
        skipped_steps: steps skipped in a row, for a NaN or an infinity.
        sample_offset: samples consumed beyond steps x batch; not 0 after a change of the batch.
        pending_row: metrics of the last step, whose evaluation was interrupted.
    """

    flip_history: list[list[float]] = field(default_factory=list)
    refreshes: int = 0
    skipped_steps: int = 0
    sample_offset: int = 0
    pending_row: dict[str, Any] | None = None

    def note_flips(self, step: int, refreshes: int, metrics: dict[str, dict[str, float]]) -> None:
        """Add a refresh to the history, once its flips are known.

        Args:
            refreshes: of all masks so far; the same as before says that nothing is new.
        """
        if refreshes == self.refreshes:
            return
        self.refreshes = refreshes
        rates = [one["flip_rate"] for one in metrics.values() if "flip_rate" in one]
        if rates:
            self.flip_history.append([step, sum(rates) / len(rates)])

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "flip_history": self.flip_history,
            "refreshes": self.refreshes,
            "skipped_steps": self.skipped_steps,
            "pending_row": self.pending_row,
        }

    @classmethod
    def of(cls, reader: CheckpointReader, config: ResolvedConfig) -> LoopState:
        """As a checkpoint left it.

        Raises:
            CheckpointError: the manifest lacks it.
        """
        saved, meta = reader.meta["state"], reader.meta
        batch = config.train.global_batch_size
        try:
            return cls(
                [list(entry) for entry in saved["flip_history"]],
                int(saved["refreshes"]),
                int(saved["skipped_steps"]),
                meta["consumed_samples"] - meta["step"] * batch,
                saved["pending_row"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{reader.folder}: state of the loop: {error!r}") from None
