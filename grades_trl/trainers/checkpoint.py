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


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Writes a state with its `"tensors"` apart: JSON and safetensors."""
    tensors = {name: tensor.contiguous() for name, tensor in state["tensors"].items()}
    save_file(tensors, Path(folder) / STATE_TENSORS)
    values = {name: value for name, value in state.items() if name != "tensors"}
    (Path(folder) / STATE_JSON).write_text(json.dumps(values, allow_nan=False), "utf-8")


def load_state(folder: str | Path) -> dict[str, Any]:
    """What `save_state` has written.

    Raises:
        ValueError: the checkpoint was written without GradES.
    """
    path = Path(folder) / STATE_JSON
    if not path.exists():
        raise ValueError(
            f"{folder} has no {STATE_JSON}: it was written without GradES or with save_only_model. To go on with "
            "GradES, start a new run from its weights (model_name_or_path); to go on without, pass grades=None "
            "(--grades false)."
        )
    return json.loads(path.read_text("utf-8")) | {"tensors": load_file(Path(folder) / STATE_TENSORS)}


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
