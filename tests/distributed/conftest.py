"""The runs of `runs.py`, made once: in two processes with DDP, in two with FSDP2, and in one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

TESTS = Path(__file__).parents[1]
COPIES = [
    *("plain", "plain_lora", "full", "accumulated", "all_used", "non_reentrant", "non_reentrant_unused", "reentrant"),
    *("lora", "lora_reentrant", "quantized", "all_frozen", "vision", "vision_lora", "gain", "paper", "weight_change"),
    *("token_accuracy", "answered", "resumed", "twice", "after_an_error", "other_bits", "text_in_one_process_alone"),
    *("diverging", "bad_row", "refused", "unused", "plain_loop"),
]
SHARDED = ["sharded_full", "sharded_lora", "sharded_gain", "sharded_paper", "sharded_vision", "sharded_resumed"]
SHARDED += ["sharded_offloaded", "sharded_quantized", "sharded_bf16"]
ONE = ["plain", "plain_lora", "full", "accumulated", "non_reentrant", "lora", "vision", "gain", "paper"]
ONE += ["token_accuracy", "plain_loop"]


def start(folder, names, processes):
    """Starts a run in one process or two, as torchrun does."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for rank in range(processes):
        environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **address}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        command = [sys.executable, str(Path(__file__).with_name("runs.py")), str(folder), *names]
        with open(folder / f"log-{names[0]}-{rank}.txt", "wb") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def wait(folder, names, started):
    for rank, process in enumerate(started):
        process.wait(timeout=1200)
        log = (folder / f"log-{names[0]}-{rank}.txt").read_text(errors="replace")
        assert process.returncode == 0, log[-3000:]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder with `one/` and `two/`, which have `NAME-RANK.json` and `NAME-RANK.safetensors`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            alone = start(folder / "one", ONE, 1)
            for names in (COPIES, SHARDED):
                wait(folder / "two", names, start(folder / "two", names, 2))
            wait(folder / "one", ONE, alone)
            (folder / "done").touch()
    return folder
