"""Runs that are killed at random moments end as the one that is left alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_three_kills(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "kill_soak.py", "--setups", "text_gain", "--kills", "3"]
    done = subprocess.run([*command, "--output_dir", tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("  killed after") == 3
    assert "every run ended as the straight one" in done.stdout
