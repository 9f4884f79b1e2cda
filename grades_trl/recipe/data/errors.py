"""What is raised when data cannot be trained on."""


class DataError(ValueError):
    """The data cannot be trained on. The message names the split, the row, what was found and what was expected."""
