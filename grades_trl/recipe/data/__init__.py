"""The rows of a run: where they come from (`sources.py`), in which format they are (`formats.py`), whether they can be
trained on (`checks.py`), how they are split into training, validation and test (`splits.py`), which replies are
learned (`replies.py`), and what the model will read (`preview.py`)."""

from .checks import check, warn_truncated_examples
from .errors import DataError
from .preview import LeaveNoFolder, show_example
from .replies import to_prompt_completion, training_rows, whole_conversations_problem
from .splits import first, load, load_data, sample, with_validation

__all__ = [
    "DataError",
    "LeaveNoFolder",
    "check",
    "first",
    "load",
    "load_data",
    "sample",
    "show_example",
    "to_prompt_completion",
    "training_rows",
    "warn_truncated_examples",
    "whole_conversations_problem",
    "with_validation",
]
