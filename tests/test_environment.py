"""What is gathered before training, also where a machine or a model lacks something."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grades_trl.report import environment
from grades_trl.report.environment import Environment, device_name, peak_memory_mib, versions
from helpers import qwen3

THREADS = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def test_environment_of_a_transformers_model(folder):
    model = qwen3()
    assert Environment.gather(model).model == "Qwen3ForCausalLM"
    model = type(model).from_pretrained(folder)
    shown = "/".join(Path(folder).parts[-2:])  # not where it lies
    assert Environment.gather(model).model == shown
    assert Environment.gather(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))).model == shown


class ConfigOfItsOwn(nn.Module):
    config = {"hidden_size": 3}  # noqa: RUF012


@pytest.mark.parametrize(("model", "name"), [(nn.Linear(2, 2), "Linear"), (ConfigOfItsOwn(), "ConfigOfItsOwn")])
def test_environment_of_a_plain_module(model, name):
    """Issue 12, 19: a module without `.config` lost the finished run."""
    found = Environment.gather(model)
    assert found.model == name
    assert found.device.startswith("CPU, ") and found.device.endswith(THREADS)
    assert found.versions["torch"] == version("torch")


def test_without_the_resource_module_of_unix_there_is_no_peak_memory(monkeypatch):
    assert peak_memory_mib(torch.device("cpu")) > 1
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_mib(torch.device("cpu")) is None


def test_packages_without_metadata_are_left_out(monkeypatch):
    def incomplete(name):
        if name in ("grades-trl", "unsloth"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(environment, "version", incomplete)
    assert set(versions()) == {"python", *environment.LIBRARIES} - {"grades-trl", "unsloth"}


@pytest.mark.parametrize("text", [None, "", "flags : x\n", "model name\t: Fast\nmodel name\t: Fast\n"])
def test_device_name_without_a_model_name(monkeypatch, text):
    monkeypatch.setattr(Path, "exists", lambda self: text is not None)
    monkeypatch.setattr(Path, "read_text", lambda self, **kwargs: text)
    monkeypatch.setattr("platform.processor", lambda: "x86")
    expected = "Fast" if text and "Fast" in text else "x86"
    assert device_name(torch.device("cpu")) == f"CPU, {expected}, {THREADS}"
    assert device_name(torch.device("mps")) == f"mps, {expected}"
