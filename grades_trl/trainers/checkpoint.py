"""What GradES adds to a checkpoint, and weights that the Trainer does not load back."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from grades_trl.durable import put_in_place
from grades_trl.wording import counted

STATE_JSON, STATE_TENSORS = "grades_state.json", "grades_state.safetensors"
# Of the state. To be raised when an older library could not go on from it, or would go on with other weights.
VERSION = 1
PARTIAL = ".partial"  # of a file that is being written


def save_state(folder: str | Path, state: dict[str, Any], rank: int = 0, shards: int = 1) -> None:
    """Writes a state with its `"tensors"` apart: JSON and safetensors, with a version and checksums of both. Of a
    sharded model each of `shards` processes writes the tensors that it has. The JSON is put in its place last: with
    it, the state is whole."""
    tensors = {name: tensor.contiguous() for name, tensor in state["tensors"].items()}
    values = {name: value for name, value in state.items() if name != "tensors"} | {"shards": shards}
    Path(folder).mkdir(exist_ok=True)
    of_values, of_tensors = _files(folder, rank)
    of_values.unlink(missing_ok=True)  # of a run that went on from an older checkpoint
    partial = of_tensors.with_suffix(PARTIAL)
    save_file(tensors, partial)
    values["sha256"] = _sha256(partial)
    put_in_place(partial, of_tensors)
    record = {"version": VERSION, "sha256": _sha256_of(values), "state": values}
    partial = of_values.with_suffix(PARTIAL)
    partial.write_text(json.dumps(record, allow_nan=False), "utf-8")
    put_in_place(partial, of_values)


def _files(folder: str | Path, rank: int) -> list[Path]:
    """JSON and tensors of a process."""
    names = [Path(STATE_JSON), Path(STATE_TENSORS)]
    return [Path(folder) / (name.with_stem(f"{name.stem}_{rank}") if rank else name) for name in names]


def load_state(folder: str | Path, rank: int = 0, shards: int = 1) -> dict[str, Any]:
    """What `save_state` has written.

    Raises:
        ValueError: the checkpoint was written without GradES, with the model in other pieces, or by a newer version of
            GradES; a file is no state of it, or not what was written.
    """
    if not (Path(folder) / STATE_JSON).exists():
        raise ValueError(
            f"{folder} has no {STATE_JSON}: it was written without GradES or with save_only_model. To go on with "
            "GradES, start a new run from its weights (model_name_or_path); to go on without, pass grades=None "
            "(--grades false)."
        )
    written = read_values(folder)["shards"]
    if written != shards:
        raise ValueError(
            f"{folder} was written with the model in {counted(written, 'piece')}, and this run has it "
            f"in {shards}: resume with FSDP, or without, and with as many processes as before."
        )
    values, tensors = read_values(folder, rank), _files(folder, rank)[1]
    if not tensors.exists():
        raise ValueError(f"{tensors} is missing. {_delete(folder)}")
    if values.pop("sha256") != _sha256(tensors):
        raise ValueError(_damaged(tensors))
    del values["shards"]
    # Copies, which lie where torch puts tensors. MKL sums the dot product of one that does not begin at a multiple of
    # 64 bytes in another order.
    return values | {"tensors": {name: tensor.clone() for name, tensor in load_file(tensors).items()}}


def read_values(folder: str | Path, rank: int = 0) -> dict[str, Any]:
    """The values of a state, without its tensors.

    Raises:
        ValueError: the file is missing, no state of GradES, of a newer version, or not what was written.
    """
    path, _ = _files(folder, rank)
    delete = _delete(folder)
    if not path.exists():
        raise ValueError(f"{path} is missing. {delete}")
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}). {delete}") from error
    if not isinstance(record, dict) or type(record.get("version")) is not int:
        raise ValueError(f"{path} is no state of GradES: it has no version. {delete}")
    if record["version"] > VERSION:
        raise ValueError(
            f"{path} was written by a newer version of grades_trl: its state has version {record['version']}, and "
            f"this one reads {VERSION}. Update grades_trl."
        )
    if record.get("sha256") != _sha256_of(record.get("state")):
        raise ValueError(_damaged(path))
    return record["state"]


def _delete(folder: str | Path) -> str:
    return f"Delete {folder}, and resume from the checkpoint before it (--resume auto takes it)."


def _damaged(file: Path) -> str:
    return f"{file} is damaged, or of another checkpoint: its checksum is wrong. {_delete(file.parent)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(values: Any) -> str:
    """Of JSON-able values: the same before they are written and after they are read."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def load_renamed_weights(model: Any, checkpoint: str | Path) -> bool:
    """Loads weights that were saved under other names than the model has.

    Vision-language models are saved under the names of earlier versions of Transformers. Its Trainer does not
    translate them back (5.17): it says that keys are missing, and goes on with the weights as they are.

    Returns:
        `bool`: `True` if there were such weights, and the model has each of its weights from the checkpoint now.
            `False` if it is as before: the names are those of the model, it is an adapter alone, or weights of the
            checkpoint and of the model do not belong together.
    """
    path, index = Path(checkpoint) / SAFE_WEIGHTS_NAME, Path(checkpoint) / SAFE_WEIGHTS_INDEX_NAME
    if path.exists():
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    elif index.exists():
        names = set(json.loads(index.read_text())["weight_map"])
    else:
        return False  # adapters alone
    if not names - set(model.state_dict()):
        return False
    # The widest dtype of the model, whose own `dtype` is that of its first parameter (perhaps a frozen 16-bit tower):
    # narrower weights come back exactly from it.
    dtypes = [t.dtype for t in model.state_dict().values() if t.is_floating_point()]
    widest = functools.reduce(torch.promote_types, dtypes)
    saved, found = type(model).from_pretrained(checkpoint, dtype=widest, output_loading_info=True)
    if found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"]:
        return False
    model.load_state_dict(saved.state_dict())
    return True
