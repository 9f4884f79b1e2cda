"""The plain loop in a process of its own: it trains, freezes by held-out gain, and is short enough to copy."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "plain_loop.py"


def run(script, folder, steps):
    done = subprocess.run(
        [sys.executable, str(script), "--steps", str(steps)], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_plain_loop(tmp_path):
    printed = run(SCRIPT, tmp_path, steps=100)
    assert "39 matrices; none freezes before step 11" in printed
    losses = [float(loss) for loss in re.findall(r"validation ([\d.]+)", printed)]
    assert len(losses) == 2 and losses[-1] < 2.5  # 5.9 before training
    assert re.search(r"100 of 100 steps, \d+ matrices frozen, exact match ", printed)
    assert list(tmp_path.iterdir()) == []


def test_plain_loop_ends_when_all_is_frozen(tmp_path):
    """A held-out loss that only grows: read first at step 10, it is no new best at 15 and 20."""
    strict = SCRIPT.read_text().replace("lambda: backward(held_out)", "lambda: backward(held_out) * step")
    (tmp_path / "strict.py").write_text(strict)
    printed = run(tmp_path / "strict.py", tmp_path, steps=100)
    froze = re.findall(r"step (\d+): froze (.+); (\d+) of 39 frozen", printed)
    assert [(step, len(names.split(", ")), frozen) for step, names, frozen in froze] == [("20", 39, "39")]
    assert "20 of 100 steps, 39 matrices frozen, exact match " in printed


def test_plain_loop_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 80
