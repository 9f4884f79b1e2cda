"""The plain loop: it trains, freezes, ends by the held-out loss, and is short enough to copy."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest

from grades_trl import GradES

SCRIPT = Path(__file__).parents[2] / "recipes" / "plain_loop.py"


@pytest.fixture
def plain_loop(tmp_path, monkeypatch, capsys):
    """The script as a module, and what it prints in a folder of its own."""
    spec = importlib.util.spec_from_file_location("plain_loop", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def printed(steps):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [str(SCRIPT), "--steps", str(steps)])
        module.main()
        return capsys.readouterr().out

    module.printed = printed
    return module


def test_plain_loop_trains_and_freezes(plain_loop, tmp_path):
    printed = plain_loop.printed(steps=100)
    assert "51 matrices; none freezes before step 9" in printed
    losses = [float(loss) for loss in re.findall(r"validation ([\d.]+)", printed)]
    assert len(losses) >= 1 and losses[-1] < 2.5
    steps = [int(step) for step in re.findall(r"step (\d+): \d+ of 51 matrices frozen", printed)]
    assert steps and min(steps) >= 16  # after two windows of 8 steps
    assert re.search(r"\d+ of 100 steps \(.+\), exact match ", printed)
    assert list(tmp_path.iterdir()) == []


def test_plain_loop_ends_by_its_heldout_loss(plain_loop, monkeypatch):
    """A loss that only grows: measured first at step 10, it is no lower at 15 and 20."""
    losses = itertools.count(1.0)

    def with_growing_loss(*args, heldout_score):
        return GradES(*args, heldout_score=lambda: next(losses))

    monkeypatch.setattr(plain_loop, "GradES", with_growing_loss)
    printed = plain_loop.printed(steps=100)
    assert "20 of 100 steps (held-out loss stopped improving), exact match " in printed


def test_plain_loop_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 80
