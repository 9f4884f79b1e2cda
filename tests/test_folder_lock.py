"""One folder, one run."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from grades_trl.recipe import folder_lock
from grades_trl.recipe.folder_lock import LOCK, lock

# A run with a worker, which outlives it.
RUN = """
import os, sys, time
from pathlib import Path
from grades_trl.recipe.folder_lock import lock
lock(Path(sys.argv[1]))
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that has the folder, and its worker."""
    with subprocess.Popen([sys.executable, "-c", RUN, tmp_path], stdout=subprocess.PIPE, text=True) as run:
        worker = int(run.stdout.readline())
        yield run
        run.kill()
        subprocess.run(["kill", "-9", str(worker)])


def test_a_folder_is_refused_while_a_run_is_alive_and_taken_when_it_is_gone(tmp_path, other_run):
    with pytest.raises(ValueError, match="is in use: process") as refused:
        lock(tmp_path)
    assert f"process {other_run.pid} on " in str(refused.value) and "another --output_dir" in str(refused.value)
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    assert str(other_run.pid) in (tmp_path / LOCK).read_text()
    lock(tmp_path)  # though its worker is still there
    assert str(other_run.pid) not in (tmp_path / LOCK).read_text()


def test_a_process_may_run_into_the_same_folder_again(tmp_path):
    lock(tmp_path / "new")
    lock(tmp_path / "new")


def test_a_folder_that_cannot_be_locked_is_used_and_said(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", fails)
    lock(tmp_path)
    assert "cannot be locked ([Errno 95] Operation not supported)" in caplog.text
    assert folder_lock._held


def test_on_windows_a_byte_behind_the_text_is_locked(tmp_path, monkeypatch):
    """With a stand-in for its module: what another process holds is refused, by the same words."""
    places = []

    def locking(descriptor, mode, count):
        places.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if len(places) > 1:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    lock(tmp_path)
    monkeypatch.setattr(folder_lock, "_held", {})  # of another process
    with pytest.raises(ValueError, match=f"is in use: process {os.getpid()} on "):
        lock(tmp_path)
    assert places == [(2**30, 2, 1)] * 2
