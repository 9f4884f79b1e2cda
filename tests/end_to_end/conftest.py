import runpy
import sys
from pathlib import Path

import pytest
import wandb

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a recipe in this process, in a folder of its own, and returns what it printed and logged."""
    monkeypatch.chdir(tmp_path)

    def run(recipe, *flags):
        for name in ("WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP"):  # that an earlier run has set
            monkeypatch.delenv(name, raising=False)
        wandb.finish()
        wandb.teardown()  # it reads the environment once
        monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / recipe), *(w for f in flags for w in str(f).split())])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def refused(run, capsys):
    """Runs a recipe that ends with exit code 2, and returns what it says on stderr."""

    def refused(recipe, *flags):
        with pytest.raises(SystemExit) as ended:
            run(recipe, *flags)
        assert ended.value.code == 2
        return capsys.readouterr().err

    return refused
