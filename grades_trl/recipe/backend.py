"""Which library loads and speeds up the model: Unsloth or Transformers. Import this before transformers or trl.

Importing Unsloth replaces parts of transformers, peft and trl, so it has to come first, and `--backend` says whether
it is imported at all. Hence this module reads the command line when it is imported, before any parser exists.
"""

import gc
import importlib.util
import itertools
import sys

import grades_trl.recipe.quiet  # noqa: F401  before any library that it hides messages of
from grades_trl.recipe.bad_input import bad_input_ends_here, blamed_on
from grades_trl.recipe.places import find_config

BACKENDS = ("auto", "unsloth", "transformers")


def requested(argv: list[str]) -> str:
    """`--backend` of a command line, or of the YAML file behind `--config`; `"auto"` if neither names one."""
    values = dict(itertools.pairwise(argv))
    values |= {flag: value for flag, sep, value in (word.partition("=") for word in argv) if sep}
    if "--backend" in values:
        return values["--backend"]
    if "--config" in values:
        import yaml

        with blamed_on(f"--config {values['--config']}", ValueError, yaml.YAMLError):
            config = yaml.safe_load(find_config(values["--config"]).read_text("utf-8"))
        # What is no mapping is refused where the arguments are read.
        return config.get("backend", "auto") if isinstance(config, dict) else "auto"
    return "auto"


def choose(name: str) -> str:
    """Decides for a backend, and imports Unsloth if that is the one.

    Args:
        name (`str`): `"unsloth"`, `"transformers"`, or `"auto"`: Unsloth if it is installed and there is a GPU.

    Returns:
        `str`: `"unsloth"` or `"transformers"`.

    Raises:
        ValueError: another name.
        ImportError: Unsloth was asked for and is not installed, or transformers was imported before it.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}.")
    installed = importlib.util.find_spec("unsloth") is not None
    if name == "auto":
        import torch

        name = "unsloth" if installed and torch.cuda.is_available() else "transformers"
    if name == "unsloth":
        if not installed:
            raise ImportError('--backend unsloth, but Unsloth is not installed: pip install -e ".[unsloth]"')
        if "trl" in sys.modules and "unsloth" not in sys.modules:
            raise ImportError("trl was imported before Unsloth: import unsloth first in your script.")
        import unsloth  # noqa: F401
    return name


# These imports make a million objects, which the garbage collector would look through again and again, and once more
# after each training: a quarter of the time until a recipe starts.
gc.disable()
with bad_input_ends_here():
    BACKEND = choose(requested(sys.argv[1:]))
import trl.trainer.sft_trainer  # noqa: E402, F401

gc.freeze()
gc.enable()
