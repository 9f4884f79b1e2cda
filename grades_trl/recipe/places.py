"""Where recipes and configs are, and the command that runs a recipe: in a checkout, or from an installed package."""

from __future__ import annotations

import sys
from pathlib import Path

from grades_trl.distributed import launch_command, launched_processes

PACKAGE = Path(__file__).parents[1]
# A wheel has recipes/, configs/ and vlm/ inside grades_trl; in a checkout they are beside it.
IS_INSTALLED = (PACKAGE / "recipes").is_dir()
ROOT = PACKAGE if IS_INSTALLED else PACKAGE.parent

COMMAND = "grades-trl"
# Subcommand -> file in recipes/
RECIPES = {
    "text": "sft_text.py",
    "vlm": "sft_vlm.py",
    "compare": "compare.py",
    "evaluate": "evaluate.py",
    "export": "export.py",
    "plan": "plan.py",
}


def config_names() -> list[str]:
    """What `--config` takes beside paths, sorted: names such as `demo_vlm` and `paper/qwen3_14b_lora`."""
    configs = ROOT / "configs"
    files = [path for path in configs.rglob("*.yaml") if path.parent.name != "accelerate"]  # those are launchers'
    return sorted(path.relative_to(configs).with_suffix("").as_posix() for path in files)


def find_config(name: str | Path) -> Path:
    """The YAML file behind `--config`: a path, or the name of a config of this package (`demo_vlm`,
    `paper/qwen3_14b_lora`).

    Raises:
        FileNotFoundError: it is neither; with the names that there are.
    """
    if Path(name).is_file():
        return Path(name)
    file = ROOT / "configs" / f"{str(name).removesuffix('.yaml')}.yaml"
    if not file.is_file():
        names = ", ".join(config_names())
        raise FileNotFoundError(f"--config {name}: no such file, and no config of that name among {names}.")
    return file


def recipe_name() -> str:
    """The recipe that is running, as `compare --recipe` takes it: the name of its file without `.py`."""
    return Path(sys.argv[0]).stem


def this_command() -> list[str]:
    """How the recipe that is running is started, without its flags."""
    if launched_processes() > 1:
        return launch_command(launched_processes())
    if IS_INSTALLED:
        return [COMMAND, next(name for name, file in RECIPES.items() if file == Path(sys.argv[0]).name)]
    return ["python", sys.argv[0]]


def command_of(recipe: str) -> list[str]:
    """How another recipe is started.

    Args:
        recipe (`str`): one of `RECIPES`.
    """
    if IS_INSTALLED:
        return [COMMAND, recipe]
    return ["python", str(Path(sys.argv[0]).with_name(RECIPES[recipe]))]
