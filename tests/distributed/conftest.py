"""The runs of `runs.py`, made once: in two processes with DDP, in two with FSDP2, and in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

TESTS = Path(__file__).parents[1]
# Without the garbage collector, imports take two thirds of the time.
MAKE = "import gc; gc.disable(); import pathlib, sys, runs; runs.main(pathlib.Path(sys.argv[1]))"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder with `one/` and `two/`, which have `NAME-RANK.json` and `NAME-RANK.safetensors`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            paths = (Path(__file__).parent, TESTS, TESTS.parent)
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
            environment |= {"TOKENIZERS_PARALLELISM": "false"}  # whose threads would not survive a fork
            command = [sys.executable, "-c", MAKE, str(folder)]
            made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
            assert made.returncode == 0, made.stderr[-3000:]
            (folder / "done").touch()
    return folder
