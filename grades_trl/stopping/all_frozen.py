"""`stopping="all_frozen"`: the run ends when every tracked matrix is frozen (arXiv 2509.01842, algorithm 1)."""

from .base import StoppingRule


class AllFrozen(StoppingRule):
    """Ends with the last freeze."""
