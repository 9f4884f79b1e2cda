import gc
import importlib
import os
import sys
from pathlib import Path

# Tiny models are slower with more threads, and nothing here may reach a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

import datasets
import pytest
import torch

torch.set_num_threads(1)
datasets.disable_progress_bars()
gc.disable()  # until all test files are imported: it would look through what is there again and again


def pytest_collection_finish():
    """Takes what is imported out of garbage collection: after each run the Trainer collects, for 0.4 s otherwise."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing them takes longer than a tiny run."""
    from grades_trl.report import run_report

    monkeypatch.setattr(run_report, "installed", lambda module: False)


@pytest.fixture(scope="module")
def zoo():
    """The tiny models of many architectures, `tests/families/zoo.py`."""
    folder = str(Path(__file__).parent / "families")
    sys.path.insert(0, folder)
    yield importlib.import_module("zoo")
    sys.path.remove(folder)
    sys.modules.pop("zoo")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Path of the embedded text model and its tokenizer, saved as a hub repository is laid out."""
    from grades_trl.recipe import builtin

    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = builtin.tiny_qwen3()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
