"""The rows of a run: where they come from (`sources.py`), in which format they are (`formats.py`), whether they can be
trained on (`checks.py`), and how they are split into training, validation and test (`splits.py`)."""

from .checks import check, warn_truncated_examples
from .errors import DataError
from .formats import to_prompt_completion
from .splits import load, load_data, sample, with_validation

__all__ = [
    "DataError",
    "check",
    "load",
    "load_data",
    "sample",
    "to_prompt_completion",
    "warn_truncated_examples",
    "with_validation",
]
