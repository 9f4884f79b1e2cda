"""Libraries that not every user needs: each is an extra of this package, asked for where it is used."""

from __future__ import annotations

import importlib.util

# module -> what pip installs, and the extra that has it. `grades-trl[all]` has all of them.
EXTRAS = {
    "bitsandbytes": ("bitsandbytes", "quantization"),
    "gguf": ("gguf", "gguf"),
    "matplotlib": ("matplotlib", "figures"),
    "sklearn": ("scikit-learn", "demo"),
    "wandb": ("wandb", "wandb"),
}


def installed(module: str) -> bool:
    """Whether a module of `EXTRAS` can be imported. A folder of that name (W&B leaves one) is no module."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def how_to_install(module: str) -> str:
    """The command that installs a module of `EXTRAS`."""
    package, extra = EXTRAS[module]
    return f'pip install {package}, or this package with its extra: "grades-trl[{extra}]"'


def require(module: str, what: str) -> None:
    """
    Args:
        module (`str`): one of `EXTRAS`.
        what (`str`): what needs it, in the plural: `"GGUF files"`.

    Raises:
        ImportError: it is not installed.
    """
    if not installed(module):
        raise ImportError(f"{what} need {EXTRAS[module][0]}, which is not installed: {how_to_install(module)}.")
