"""Tells a run that has diverged from one that has converged: both stop improving."""

from __future__ import annotations

import math
from typing import Any

# Consecutive optimizer steps after which a run has diverged. A single one can be a batch without a label.
PATIENCE = 10
HAS_DIVERGED = (
    "The run has diverged: since step %d its loss is no number, or far above that of guessing. Lower --learning_rate, "
    "or look at the rows of that step."
)


class Divergence:
    """
    Watches the training loss.

    A run has diverged when its loss was no finite number, or more than twice that of guessing, for ten optimizer steps
    in a row. Guessing among V tokens costs `ln V`; a loss that has begun higher than twice that (a model made on the
    spot, another kind of loss) has to be no finite number.

    Args:
        vocab_size (`int` or `None`): V; `None` where the model does not predict tokens.

    Attributes:
        since (`int` or `None`): the first optimizer step of the divergence.
        not_finite (`int`): optimizer steps so far whose loss was no finite number.
    """

    def __init__(self, vocab_size: int | None):
        self._limit = math.inf if vocab_size is None else 2 * math.log(max(vocab_size, 2))
        self._began: int | None = None
        self._first = True
        self.since: int | None = None
        self.not_finite = 0

    def update(self, step: int, loss: float) -> None:
        """Takes in the loss of an optimizer step."""
        self.not_finite += not math.isfinite(loss)
        if self._first and math.isfinite(loss) and loss > self._limit:
            self._limit = math.inf
        self._first = False
        if math.isfinite(loss) and loss <= self._limit:
            self._began = None
            return
        self._began = step if self._began is None else self._began
        if step - self._began + 1 >= PATIENCE:
            self.since = self._began

    @classmethod
    def of(cls, model: Any) -> Divergence:
        """For the training loss of a model, by its vocabulary if it has one."""
        text_config = model.config.get_text_config() if hasattr(model, "config") else None
        return cls(getattr(text_config, "vocab_size", None))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        limit = self._limit if math.isfinite(self._limit) else None
        return {"limit": limit, "began": self._began, "first": self._first, "not_finite": self.not_finite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._limit = math.inf if state["limit"] is None else state["limit"]
        self._began, self._first, self.not_finite = state["began"], state["first"], state["not_finite"]
