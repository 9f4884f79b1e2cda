"""What GradES adds to a checkpoint, and weights that the Trainer does not load back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

STATE_JSON, STATE_TENSORS = "grades_state.json", "grades_state.safetensors"


def save_state(folder: str | Path, state: dict[str, Any], rank: int = 0, shards: int = 1) -> None:
    """Writes a state with its `"tensors"` apart: JSON and safetensors. Of a sharded model each of `shards` processes
    writes the tensors that it has."""
    tensors = {name: tensor.contiguous() for name, tensor in state["tensors"].items()}
    Path(folder).mkdir(exist_ok=True)
    save_file(tensors, tensors_file(folder, rank))
    if rank:
        return
    values = {name: value for name, value in state.items() if name != "tensors"} | {"shards": shards}
    (Path(folder) / STATE_JSON).write_text(json.dumps(values, allow_nan=False), "utf-8")


def tensors_file(folder: str | Path, rank: int) -> Path:
    """Where the tensors of a process are."""
    name = Path(STATE_TENSORS)
    return Path(folder) / (name.with_stem(f"{name.stem}_{rank}") if rank else name)


def load_state(folder: str | Path, rank: int = 0, shards: int = 1) -> dict[str, Any]:
    """What `save_state` has written.

    Raises:
        ValueError: the checkpoint was written without GradES, or with the model in other pieces.
    """
    path = Path(folder) / STATE_JSON
    if not path.exists():
        raise ValueError(
            f"{folder} has no {STATE_JSON}: it was written without GradES or with save_only_model. To go on with "
            "GradES, start a new run from its weights (model_name_or_path); to go on without, pass grades=None "
            "(--grades false)."
        )
    values = json.loads(path.read_text("utf-8"))
    written = values.pop("shards")
    if written != shards:
        raise ValueError(
            f"{folder} was written with the model in {written} piece{'s' if written > 1 else ''}, and this run has it "
            f"in {shards}: resume with FSDP, or without, and with as many processes as before."
        )
    return values | {"tensors": load_file(tensors_file(folder, rank))}


def load_renamed_weights(model: Any, checkpoint: str | Path) -> None:
    """Loads weights that were saved under other names than the model has.

    Vision-language models are saved under the names of earlier versions of Transformers. Its Trainer does not
    translate them back (5.17): it says that keys are missing, and goes on with the weights as they are.
    """
    path, index = Path(checkpoint) / SAFE_WEIGHTS_NAME, Path(checkpoint) / SAFE_WEIGHTS_INDEX_NAME
    if path.exists():
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    elif index.exists():
        names = set(json.loads(index.read_text())["weight_map"])
    else:
        return  # adapters alone
    if names - set(model.state_dict()):
        saved: nn.Module = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
