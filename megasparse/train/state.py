"""What the training loop itself remembers, as JSON in the manifest of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megasparse.checkpoint.reader import CheckpointReader
from megasparse.errors import CheckpointError


@dataclass
class LoopState:
    """Beside the clock.

    Attributes:
        flip_history: (step, flip rate over all sparse layers) at every mask refresh.
        refreshes: masks computed by then.
        skipped_steps: steps skipped in a row, for a NaN or an infinity.
        density: of the sparse layers when it was last measured; None: never.
        pending_row: metrics of the last step, whose evaluation was interrupted.
    """

    flip_history: list[list[float]] = field(default_factory=list)
    refreshes: int = 0
    skipped_steps: int = 0
    density: float | None = None
    pending_row: dict[str, Any] | None = None

    def note_flips(self, step: int, refreshes: int, rate: float | None) -> None:
        """Add a refresh to the history, once its flips are known.

        Args:
            refreshes: of all masks so far; the same as before says that nothing is new.
            rate: all flips over all entries; None: no mask has been refreshed twice.
        """
        if refreshes == self.refreshes:
            return
        self.refreshes = refreshes
        if rate is not None:
            self.flip_history.append([step, rate])

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "flip_history": self.flip_history,
            "refreshes": self.refreshes,
            "skipped_steps": self.skipped_steps,
            "density": self.density,
            "pending_row": self.pending_row,
        }

    @classmethod
    def of(cls, reader: CheckpointReader) -> LoopState:
        """As a checkpoint left it.

        Raises:
            CheckpointError: the manifest lacks it.
        """
        saved = reader.meta["state"]
        try:
            return cls(
                flip_history=[list(entry) for entry in saved["flip_history"]],
                refreshes=int(saved["refreshes"]),
                skipped_steps=int(saved["skipped_steps"]),
                density=saved.get("density"),
                pending_row=saved["pending_row"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{reader.folder}: state of the loop: {error!r}") from None
