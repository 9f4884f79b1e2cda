"""The plain loop in a process of its own: it trains, freezes by held-out gain, and is short enough to copy."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "plain_loop.py"


def test_plain_loop(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "100"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "39 matrices; none freezes before step 31" in done.stdout
    losses = [float(loss) for loss in re.findall(r"validation ([\d.]+)", done.stdout)]
    assert len(losses) >= 2 and losses[-1] < 2.5  # 5.9 before training
    frozen = re.findall(r"step (\d+): froze (.+); (\d+) of 39 frozen", done.stdout)
    assert frozen and all(int(step) > 30 for step, _, _ in frozen)
    assert sum(len(names.split(", ")) for _, names, _ in frozen) == int(frozen[-1][2])
    assert f"{frozen[-1][2]} matrices frozen, exact match " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_plain_loop_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 80
