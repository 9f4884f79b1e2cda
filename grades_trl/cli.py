"""The command `grades-trl`: each subcommand runs the recipe of that name, as `python recipes/NAME.py` does.

Importing this module makes `vlm` importable in an installed package.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import sys
import textwrap

from grades_trl.recipe.places import COMMAND, IS_INSTALLED, RECIPES, ROOT, config_names


def main() -> None:
    """Runs the recipe that the first argument names, with the other arguments.

    Raises:
        SystemExit: no subcommand of that name; otherwise as the recipe ends.
    """
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return
    if name not in RECIPES:
        raise SystemExit(f"{COMMAND} has no subcommand {name!r}; expected one of {', '.join(RECIPES)}.")
    recipe = str(ROOT / "recipes" / RECIPES[name])
    sys.argv = [recipe, *flags]
    runpy.run_path(recipe, run_name="__main__")


def _help() -> str:
    lines = [f"usage: {COMMAND} RECIPE [--config NAME] [--flag value ...]", ""]
    for name, file in RECIPES.items():
        code = ast.parse((ROOT / "recipes" / file).read_text("utf-8"))
        first_sentence = re.split(r"[:.]\s", ast.get_docstring(code) or "", maxsplit=1)[0]
        lines.append(f"  {name:<10}{' '.join(first_sentence.split())}")
    configs = textwrap.wrap(f"Configs: {', '.join(config_names())}", 80, subsequent_indent="  ")
    return "\n".join([*lines, "", f"Flags of a recipe: {COMMAND} RECIPE --help", "", *configs])


def _make_vlm_importable() -> None:
    """Recipes import `vlm`. A wheel has it inside grades_trl, since it claims no other top-level name."""
    folder = ROOT / "vlm"
    spec = importlib.util.spec_from_file_location(
        "vlm", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["vlm"] = vlm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vlm)


if IS_INSTALLED:  # when it is imported: worker processes import this module and unpickle what is in vlm
    _make_vlm_importable()

if __name__ == "__main__":
    main()
