"""What a stopping rule is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class StoppingRule:
    """
    Decides when the run ends. Knows numbers only.

    Args:
        total_steps (`int`): optimizer steps of the whole schedule.
        **settings: those named in `defaults`.

    Attributes:
        defaults (`dict`): the settings, without the prefix that they have in `GradESConfig`, and their defaults.
        ends_when_all_frozen (`bool`): whether the run ends with the last freeze. (It ends anyway where nothing is left
            that trains at all.)
        description (`str`): when the run ends; completes "The run ends ...".
        reason (`str`): why the rule has ended the run; empty while it goes on.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    ends_when_all_frozen: bool = True

    def __init__(self, total_steps: int, **settings: Any):
        self.description = "with its schedule, or when all tracked matrices are frozen"
        self.reason = ""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
